"""kvpress's presses with kvquant's caches: prune, then quantise.

    from kvpress import SnapKVPress
    from kvquant.integrations.kvpress import pressed

    cache = QuantizedCache(backend="hqq", nbits=4, config=model.config)
    with pressed(model, SnapKVPress(compression_ratio=0.5)):
        model(prompt_ids, past_key_values=cache)

A press hooks into the attention layers, and after each has filled its layer of the cache it replaces what is there by
less. `pressed` does two things that ``with press(model)`` does not. While a layer is filled for the first time it is in
full precision, so that the press scores the states themselves, and only those that it keeps are quantised, once. And
kvpress looks for two arguments of attention layers that transformers no longer passes, ``cache_position`` and, in newer
versions, ``past_key_values``; it finds them again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvquant.cache.layer import QuantizedLayer

#: What attention layers are called in the models that kvpress knows.
_ATTENTION = "self_attn"


@contextlib.contextmanager
def pressed(model: PreTrainedModel, press: Any) -> Iterator[None]:
    """Prune every cache that the model fills inside the block, with any press of kvpress.

    Args:
        model: a model that kvpress supports.
        press: the press, or anything that is called with a model and gives a context manager.
    """
    layers = [module for name, module in model.named_modules() if name.rpartition(".")[2] == _ATTENTION]
    visits = {layer: _Visit() for layer in layers}
    with contextlib.ExitStack() as stack:
        for layer, visit in visits.items():
            stack.callback(visit.leave)
            stack.callback(layer.register_forward_pre_hook(visit.enter, with_kwargs=True).remove)
        stack.enter_context(press(model))
        for layer, visit in visits.items():
            # torch hands one mapping of arguments to all hooks of a call: what the first puts there the press finds.
            stack.callback(layer.register_forward_hook(visit.tell, with_kwargs=True, prepend=True).remove)
            stack.callback(layer.register_forward_hook(visit.after, with_kwargs=True).remove)
        yield


class _Visit:
    """One attention layer at work on a cache."""

    def __init__(self) -> None:
        self._cache: Cache | None = None
        self._index = self._past = 0
        self._quantized: QuantizedLayer | None = None

    def enter(self, module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Put a layer in full precision in the place of an empty quantised one."""
        self._cache = kwargs.get("cache", kwargs.get("past_key_values"))
        self._index = int(module.layer_idx)  # type: ignore[arg-type]  # attention layers have it
        if self._cache is None:
            return
        while self._cache.layer_class_to_replicate is not None and len(self._cache.layers) <= self._index:
            self._cache.layers.append(self._cache.layer_class_to_replicate())
        layer = self._cache.layers[self._index]
        self._past = int(layer.get_seq_length())
        if isinstance(layer, QuantizedLayer) and not self._past:
            self._quantized, self._cache.layers[self._index] = layer, DynamicLayer()

    def tell(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        """Give the press the arguments that it looks for."""
        kwargs.setdefault("past_key_values", self._cache)
        states = kwargs["hidden_states"]
        position = torch.arange(self._past, self._past + states.shape[1], device=states.device)
        kwargs.setdefault("cache_position", position)

    def after(self, _module: nn.Module, _args: Any, _kwargs: dict[str, Any], _output: Any) -> None:
        """Quantise what the press has left."""
        quantized, exact = self._quantized, self.leave()
        if quantized is not None and exact is not None:
            quantized.update(exact.keys, exact.values)

    def leave(self) -> DynamicLayer | None:
        """Put the quantised layer back in its place, and return the one that stood there."""
        exact = None
        if self._cache is not None and self._quantized is not None:
            exact = self._cache.layers[self._index]
            self._cache.layers[self._index] = self._quantized
        self._cache = self._quantized = None
        return exact

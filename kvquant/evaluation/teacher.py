"""Teacher forcing through a cache: a known text is fed token by token, and the model says what it would have expected.

Feeding one token at a time is slow. Between two flushes a cache changes by appending exact states alone, so the tokens
up to the next flush can go through the model in one pass, each of them attending over what the cache would hold at its
turn: sink, body, and the window up to itself (a causal mask). `alike` says how many they are. The numbers are those of
one token at a time up to the rounding of a matrix product over several tokens beside that over one; the same tokens
are quantised, at the same time and in the same groups.

This differs from one forward pass over states that were quantised and dequantised (`one_pass_logits`): there every
token sees its own neighbourhood quantised, in groups that reach into its future.

In its first pass attention reads the states themselves, whatever a cache makes of them. So a text that is fed to many
caches needs one pass for all of them, whose states are then handed to each, see `Prefill`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import QuantizedLayer as TransformersQuantizedLayer

from kvquant.cache.compat import APPENDING_LAYERS, OWN_QUANTIZED_LAYER, given
from kvquant.cache.layer import QuantizedLayer
from kvquant.evaluation.candidates import held_states, is_quantized

#: Tokens in one pass at most, which bounds the memory of their logits.
MOST_AT_ONCE = 128


class Prefill:
    """The beginning of a text, which the model runs through once, and which many caches are filled with.

    Attributes:
        tokens: int64 ``[1, tokens]``.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor) -> None:
        """Say what is to be run; nothing runs yet.

        Args:
            model: the model.
            tokens: int64 ``[1, tokens]``, at least one.
        """
        self.tokens = tokens
        self._model = model
        self._logits: Tensor | None = None
        self._updates: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @torch.no_grad()
    def into(self, cache: Cache) -> Tensor:
        """Fill an empty cache, and return what the model expects next, logits ``[1, vocabulary]``.

        The first pass is kept in mind; later caches get the states of it, and hold to the last bit what a pass of
        their own would have given them. Caches with layers of which that is not known get one.
        """
        if not cache.layers or not all(_hands_back(layer) for layer in cache.layers):
            return self._run(cache)
        if self._logits is None:
            cache.update = functools.partial(self._remember, cache.update)
            try:
                self._logits = self._run(cache)
            finally:
                del cache.update  # the class's own again
            return self._logits
        for states, options in self._updates:
            cache.update(*states, **options)
        return self._logits

    def _run(self, cache: Cache) -> Tensor:
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self._model.forward).parameters else {}
        out = self._model(input_ids=self.tokens, use_cache=True, **given(self._model, cache), **last)
        logits: Tensor = out.logits[0, -1:]
        return logits

    def _remember(self, update: Any, *states: Any, **options: Any) -> Any:
        result = update(*states, **options)
        self._updates.append((states, options))
        return result


def _hands_back(layer: Any) -> bool:
    """Whether a layer returns the states of its first update as they are, so that attention is not the cache's."""
    return isinstance(layer, (QuantizedLayer, OWN_QUANTIZED_LAYER)) or type(layer) in APPENDING_LAYERS


def alike(cache: Cache, most: int) -> int:
    """Return how many tokens can be fed at once, each seeing what it would see if they came one at a time.

    Args:
        cache: a cache that holds some tokens already.
        most: the most to return, at least 1.
    """
    return min((_alike(layer, most) for layer in cache.layers), default=1)


def _alike(layer: Any, most: int) -> int:
    if isinstance(layer, QuantizedLayer):
        if not layer.is_initialized:
            return 1
        store, _ = layer.stores
        # A flush comes before attention: the first token may bring one, the others must bring no other.
        leaving, tokens = store.leaving(1), 1
        while tokens < most and store.leaving(tokens + 1) == leaving:
            tokens += 1
        return tokens
    if isinstance(layer, TransformersQuantizedLayer):
        # Its flush comes after attention, when the window is full with the new token. That one comes alone: older
        # versions of transformers count one token whatever comes.
        waiting = layer.keys.shape[-2] if layer.keys.dim() == 4 else 0
        return min(most, max(1, int(layer.residual_length) - 1 - waiting))
    return most if type(layer) in APPENDING_LAYERS else 1


@torch.no_grad()
def forced_logits(
    model: PreTrainedModel, cache: Cache, tokens: Tensor, prefill: int | Prefill, *, one_by_one: bool = False
) -> Iterator[Tensor]:
    """Feed a text and yield what the model expects after each of its tokens, from the last of the prefill on.

    Args:
        model: the model.
        cache: an empty cache; all of `tokens` is in it at the end.
        tokens: int64 ``[1, tokens]``.
        prefill: tokens that are fed in one pass at the start, at least 1; or that pass, for many caches.
        one_by_one: feed the others one at a time, as generation does. Otherwise as many at once as makes no
            difference, see `alike`.

    Yields:
        Logits ``[some, vocabulary]``, ``1 + tokens - prefill`` rows in all.
    """
    first = Prefill(model, tokens[:, :prefill]) if isinstance(prefill, int) else prefill
    yield first.into(cache)
    at, end = first.tokens.shape[1], tokens.shape[1]
    while at < end:
        count = 1 if one_by_one else alike(cache, min(MOST_AT_ONCE, end - at))
        yield model(input_ids=tokens[:, at : at + count], use_cache=True, **given(model, cache)).logits[0]
        at += count


@torch.no_grad()
def one_pass_logits(model: PreTrainedModel, cache: Cache, tokens: Tensor, prefill: int) -> Tensor:
    """Feed a text in one forward pass in which attention reads what the cache holds at the end: the wrong way.

    It is what is often measured in place of a cache. Every token attends over quantised states where generation would
    still have exact ones, and groups along tokens let it see a little of what comes after it.

    Args:
        model, cache, tokens, prefill: as for `forced_logits`.

    Returns:
        Logits ``[tokens - prefill, vocabulary]`` after each token behind the prefill.
    """
    for layer in cache.layers:
        if is_quantized(layer):
            layer.update = functools.partial(_update_and_read_back, layer, layer.update)
    logits: Tensor = model(input_ids=tokens, use_cache=True, **given(model, cache)).logits[0, prefill:]
    return logits


def _update_and_read_back(layer: Any, update: Any, *states: Any, **options: Any) -> tuple[Tensor, Tensor]:
    dtype = states[0].dtype
    update(*states, **options)
    keys, values = held_states(layer)
    return keys.to(dtype), values.to(dtype)

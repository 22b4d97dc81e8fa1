"""What a model takes and what it caches, from its config alone: the model is made without numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvquant.cache.compat import dynamic_layers, given
from kvquant.cache.layers import memory_of
from kvquant.errors import ModelLoadError, OptionValueError, UnsupportedError
from kvquant.evaluation.advice import without_advice
from kvquant.evaluation.failures import FAILURES, one_line
from kvquant.evaluation.loading import DTYPES
from kvquant.evaluation.planning.weights import Weights, count_weights

#: The type of weights where neither the config nor the user says one.
DEFAULT_DTYPE = "bfloat16"

_META = torch.device("meta")
#: Classes that can generate text with a cache like `DynamicCache`, the first that knows a config is taken.
_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText)
#: Layers whose memory is that of their keys and values.
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class LayerStates:
    """What one layer of a model caches.

    Attributes:
        shapes: ``(kv_heads, head_dim)`` of keys and of values, None where a layer has neither.
        dtypes: their types.
        fixed: bytes beside them that are the same whatever the context: the states of linear attention.
        growing: bytes beside them that each token adds: the keys of an indexer.
    """

    shapes: tuple[tuple[int, int], tuple[int, int]] | None
    dtypes: tuple[torch.dtype, torch.dtype] | None
    fixed: int = 0
    growing: int = 0

    def like(self, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[batch, kv_heads, tokens, head_dim]`` without meaning."""
        if self.shapes is None or self.dtypes is None:
            raise ValueError("this layer has no keys and values")
        keys, values = (
            torch.empty((batch, heads, tokens, channels), dtype=dtype, device=device)
            for (heads, channels), dtype in zip(self.shapes, self.dtypes, strict=True)
        )
        return keys, values


@dataclass(frozen=True)
class ModelShape:
    """A model without its numbers.

    Attributes:
        name: the name, folder or file that its config comes from.
        config: its config.
        architecture: its class.
        dtype: name of the type of weights and states.
        batch: sequences at once.
        layers: what each layer caches.
        weights: what its weights take.
    """

    name: str
    config: PreTrainedConfig
    architecture: str
    dtype: str
    batch: int
    layers: tuple[LayerStates, ...]
    weights: Weights

    @property
    def positions(self) -> int | None:
        """Tokens that the model can see at most, None where its config does not say."""
        longest = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return None if longest is None else int(longest)

    def describe(self) -> dict[str, Any]:
        """Return what matters of it, as plain builtins."""
        return {
            "name": self.name,
            "architecture": self.architecture,
            "dtype": self.dtype,
            "layers": len(self.layers),
            "positions": self.positions,
        }


def model_shape(name: str, *, dtype: str = "auto", batch: int = 1, weights: int | None = None) -> ModelShape:
    """Read a config and find out what its model takes and caches.

    Args:
        name: name of a model, its folder, or a config.json file.
        dtype: one of `loading.DTYPES`; ``auto`` takes the config's, or bfloat16 where it says none.
        batch: sequences at once.
        weights: bytes of the weights, None to count them.

    Raises:
        OptionValueError: there is no such type.
        ModelLoadError: there is no such config, or no model can be made of it.
        UnsupportedError: it is no decoder with a cache, or its forward pass cannot run without numbers.
    """
    if dtype not in DTYPES:
        raise OptionValueError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    with without_advice():
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as cause:
            raise ModelLoadError(name, cause) from cause
        chosen = _dtype(config) if dtype == "auto" else dtype
        model = _make(name, config, chosen)
        layers = _layers(name, model, batch)
        counted = count_weights(model, config, chosen)
    if weights is not None:
        counted = Weights(weights, counted.parameters, "as given")
    return ModelShape(name, config, type(model).__name__, chosen, batch, layers, counted)


def _dtype(config: PreTrainedConfig) -> str:
    found = config.dtype or config.get_text_config(decoder=True).dtype
    return DEFAULT_DTYPE if found is None else str(found).removeprefix("torch.")


def _make(name: str, config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder, of which only a run tells how many states it caches; plans are for decoders"
        raise UnsupportedError(f"the model {name!r}", [reason], "plan")
    known = [auto for auto in _CLASSES if type(config) in auto._model_mapping]
    if not known:
        reason = f"transformers has no class for {config.model_type!r} that generates text"
        raise UnsupportedError(f"the model {name!r}", [reason], "plan")
    try:
        with _META:
            return known[0].from_config(config, dtype=getattr(torch, dtype)).eval()
    except FAILURES as cause:
        raise ModelLoadError(name, ValueError(f"its config makes no model ({one_line(cause).rstrip('.')}).")) from cause


def _layers(name: str, model: PreTrainedModel, batch: int) -> tuple[LayerStates, ...]:
    """Return what each layer caches, as short runs through the model without numbers show it."""
    for module in model.modules():
        # Positions that change with the length look at the tokens; what is cached has the same shape with any.
        if isinstance(kind := getattr(module, "rope_type", None), str):
            module.rope_type = "default"
        elif isinstance(kind, dict):
            module.rope_type = dict.fromkeys(kind, "default")
    try:
        model.set_experts_implementation("batched_mm")  # others want types or devices that have nothing to do with it
        two = _run(model, batch, 2)
        plain = all(type(layer) in _PLAIN or _held(layer) == 0 for layer in two)
        three = two if plain else _run(model, batch, 3)
    except FAILURES as cause:
        kinds = ", ".join(dict.fromkeys(type(layer).__name__ for layer in dynamic_layers(model.config))) or "unknown"
        reason = f"its forward pass without numbers, over layers of the kinds {kinds}, fails ({one_line(cause)})"
        raise UnsupportedError(f"the model {name!r}", [reason], "plan") from cause
    return tuple(_states(*layer) for layer in zip(dynamic_layers(model.config), two, three, strict=True))


def _run(model: PreTrainedModel, batch: int, tokens: int) -> list[Any]:
    cache = DynamicCache(config=model.config)
    ids = torch.ones((batch, tokens), dtype=torch.int64, device=_META)
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **given(model, cache))
    return list(cache.layers)


def _states(empty: Any, two: Any, three: Any) -> LayerStates:
    """Return what a layer caches.

    Args:
        empty: the layer before its first token.
        two, three: it after as many.
    """
    keys, values = (getattr(two, stream, None) for stream in ("keys", "values"))
    if not (isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == values.dim() == 4):
        growing = _held(three) - _held(two)
        return LayerStates(None, None, _held(two) - 2 * growing, growing)
    shapes = ((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3]))
    dtypes = (keys.dtype, values.dtype)
    growing = 0
    if three is not two:
        added = keys.nbytes // keys.shape[2] + values.nbytes // values.shape[2]
        growing = _held(three) - _held(two) - added
    empty.update(*LayerStates(shapes, dtypes).like(keys.shape[0], 2, _META))
    return LayerStates(shapes, dtypes, _held(two) - _held(empty) - 2 * growing, growing)


def _held(layer: Any) -> int:
    return memory_of(0, layer).nbytes

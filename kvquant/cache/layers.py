"""The layers of a cache, quantised ones and transformers' own: which they are, and what is asked of either kind."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvquant.cache.compat import is_full_attention, sliding_window
from kvquant.cache.layer import QuantizedLayer
from kvquant.cache.sliding import QuantizedSlidingLayer
from kvquant.cache.static import full_attention_layer
from kvquant.engine.config import CacheConfig
from kvquant.engine.memory import LayerMemory, layer_memory
from kvquant.errors import CropError, UnsupportedError


def quantized_layer(template: object, config: CacheConfig, index: int, channels: int | None) -> QuantizedLayer | None:
    """Return the layer that takes the place of one of transformers' own, or None where it stays as it is.

    Full attention is quantised, sliding windows where it pays, unless the cache is of fixed size; all else keeps
    transformers' own layer.

    Raises:
        UnsupportedError: the backend cannot do what is asked for states of `channels` channels.
    """
    window = sliding_window(template)
    if window is None and not is_full_attention(template):
        return None
    layer = full_attention_layer(config, index) if window is None else QuantizedSlidingLayer(config, index, window)
    key_scheme, value_scheme = (one.scheme(channels) for one in (layer.settings.key, layer.settings.value))
    return layer if layer.policy(key_scheme, value_scheme).pays else None


def together(layers: list[Any]) -> list[Any]:
    """Have the quantised layers of a cache be fetched ahead of each other, and return all."""
    ours = [layer for layer in layers if isinstance(layer, QuantizedLayer)]
    for layer in ours:
        layer.lookahead = ours[0].lookahead
    return layers


def check_updated_once(layers: list[Any]) -> None:
    """Refuse another layer where the one before has been updated more than once since it was made, just before.

    Raises:
        UnsupportedError: it has, as decoders do that attend to an encoder and find only one cache.
    """
    last = layers[-1] if layers else None
    if isinstance(last, QuantizedLayer) and last.is_initialized and last.stores[0].version > 1:
        reasons = [
            f"{last.where} was updated more than once before the next layer was at all, so its states may be mixed up",
            "for encoder-decoder models use kvquant.QuantizedEncoderDecoderCache(config=model.config, ...)",
            "after a forward pass that failed half-way call reset()",
        ]
        raise UnsupportedError("this cache", reasons)


def memory_of(index: int, layer: Any) -> LayerMemory:
    """Return what the memory of a layer is made of, of transformers' own layers too.

    Args:
        index: the layer's number.
        layer: any layer of a cache; layers of linear attention keep their states in mappings.
    """
    if isinstance(layer, QuantizedLayer):
        return layer.memory()
    values = [
        part for value in vars(layer).values() for part in (value.values() if isinstance(value, dict) else [value])
    ]
    held = [value for value in values if isinstance(value, Tensor)]
    tokens = layer.get_seq_length() if held and hasattr(layer, "get_seq_length") else 0
    return layer_memory(index, int(tokens), (0, 0), [("full precision", tensor, tensor.nbytes) for tensor in held])


def check_crop(index: int, layer: Any, tokens_to_remove: int) -> None:
    """Raise what cropping `layer` would raise, and what transformers' own layers do wrong without a word."""
    if isinstance(layer, QuantizedLayer):
        layer.check_crop(tokens_to_remove)
        return
    if not isinstance(layer, CacheLayerMixin):
        return
    length = int(layer.get_seq_length())
    if tokens_to_remove > 0 or -tokens_to_remove > length > 0:
        raise CropError(tokens_to_remove, length)
    window = getattr(layer, "sliding_window", None)
    if tokens_to_remove and window is not None and length >= window and not getattr(layer, "record_past", False):
        reason = f"layer {index} keeps a sliding window of {window} tokens, which has moved on and cannot go back"
        raise CropError(tokens_to_remove, length, reason)

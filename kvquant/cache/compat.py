"""What kvquant asks of transformers beyond its documented cache classes: the one file to look at when they move."""

from __future__ import annotations

import copy

from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

#: Config attributes of latent attention, whose `head_dim` is not that of the cached states.
_LATENT_ATTENTION = ("kv_lora_rank", "qk_nope_head_dim")


def dynamic_layers(config: PreTrainedConfig | None) -> list[object]:
    """Return the layers that transformers' own dynamic cache has for a model; empty when there is no config.

    Asking the cache itself follows every model and every version, where reading the config would have to know them.
    """
    return [] if config is None else list(DynamicCache(config=config).layers)


def static_layers(config: PreTrainedConfig | None, max_cache_len: int) -> list[object]:
    """Return the layers that transformers' own cache of fixed size has for a model; empty when there is no config."""
    return [] if config is None else list(StaticCache(config=config, max_cache_len=max_cache_len).layers)


def is_full_attention(layer: object) -> bool:
    """Whether a layer of transformers' own caches is plain full attention, which is what kvquant quantises."""
    return type(layer) in (DynamicLayer, StaticLayer)


def sliding_window(layer: object) -> int | None:
    """Return the tokens that a query sees in a sliding-window or chunked layer of the dynamic cache, None in others.

    Layers that keep other states beside, as some hybrid ones do, are others.
    """
    is_sliding = type(layer) is DynamicSlidingWindowLayer
    return int(layer.sliding_window) if is_sliding else None  # type: ignore[attr-defined]  # no types


def layer_classes() -> dict[str, type]:
    """Return the layers that transformers' own caches are made of, by the names of their classes."""
    kinds = (*DYNAMIC_LAYER_TYPE_MAPPING.values(), *STATIC_LAYER_TYPE_MAPPING.values())
    return {kind.__name__: kind for kind in kinds}


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return what the decoder of an encoder-decoder model would say of itself if it stood alone."""
    decoder = copy.copy(config.get_text_config(decoder=True))
    if getattr(decoder, "num_decoder_layers", None) is not None:
        decoder.num_hidden_layers = decoder.num_decoder_layers  # T5 and its kin, whose other number is the encoder's
    decoder.is_encoder_decoder = False
    return decoder


def head_dim(config: PreTrainedConfig | None) -> int | None:
    """Return the channels of a head of the cached states, or None where the config does not tell."""
    if config is None:
        return None
    text = config.get_text_config(decoder=True)
    if getattr(text, "is_heterogeneous", False):
        return None  # layers differ, and such a config refuses to speak for all of them
    if any(getattr(text, name, None) is not None for name in _LATENT_ATTENTION):
        return None
    stated = getattr(text, "head_dim", None)
    if stated is not None:
        return int(stated)
    hidden, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    return int(hidden) // int(heads) if hidden and heads else None

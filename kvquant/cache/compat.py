"""What kvquant asks of transformers beyond its documented cache classes: the one file to look at when they move."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer, DynamicSlidingWindowLayer

#: What transformers' own quantised layers have in common: a class of its own since there is one for FP8 (5.21).
OWN_QUANTIZED_LAYER: Any = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)

#: Its layers that append what they are given and quantise by what they have seen before, whatever comes with it.
APPENDING_LAYERS: tuple[type, ...] = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    *([cache_utils.Fp8QuantizedLayer] if hasattr(cache_utils, "Fp8QuantizedLayer") else []),
)

#: Config attributes of latent attention, whose `head_dim` is not that of the cached states.
_LATENT_ATTENTION = ("kv_lora_rank", "qk_nope_head_dim")


def dynamic_layers(config: PreTrainedConfig | None) -> list[object]:
    """Return the layers that transformers' own dynamic cache has for a model; empty when there is no config.

    Asking the cache itself follows every model and every version, where reading the config would have to know them.
    """
    return [] if config is None else list(DynamicCache(config=config).layers)


def is_full_attention(layer: object) -> bool:
    """Whether a layer of the dynamic cache is plain full attention, which is what kvquant quantises."""
    return type(layer) is DynamicLayer


def layer_classes() -> dict[str, type]:
    """Return the layers that transformers' dynamic caches are made of, by the names of their classes."""
    return {kind.__name__: kind for kind in DYNAMIC_LAYER_TYPE_MAPPING.values()}


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

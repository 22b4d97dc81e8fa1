"""What kvquant asks of transformers beyond its documented cache classes: the one file to look at when they move."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from types import SimpleNamespace
from typing import Any

import transformers
from packaging.version import Version
from transformers import (
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
    cache_utils,
)
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvquant.errors import UnsupportedError

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

#: Config attributes of heads that are not as wide as others: those of some layers, or of values.
_OTHER_HEADS = ("global_head_dim", "swa_head_dim", "v_head_dim")

#: Models whose `generate` makes the cross-attention cache anew, knowing nothing of it but its class.
_REMAKES_CROSS_ATTENTION = ("t5gemma", "t5gemma2")


#: transformers' argument for a cache has another name since 5.24.
_RENAMED = Version(transformers.__version__).release >= (5, 24)


def given(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """Return a cache as the argument by which a model's forward pass, and its `generate`, take it."""
    names = inspect.signature(model.forward).parameters
    if "cache" in names or "past_key_values" in names:
        return {"cache" if "cache" in names else "past_key_values": cache}
    return {"cache" if _RENAMED else "past_key_values": cache}  # a model inside another one, with any arguments


def dynamic_layers(config: PreTrainedConfig | None) -> list[object]:
    """Return the layers that transformers' own dynamic cache has for a model; empty when there is no config.

    Asking the cache itself follows every model and every version, where reading the config would have to know them.

    Raises:
        UnsupportedError: this transformers has no dynamic cache for the model.
    """
    if config is None:
        return []
    try:
        return list(DynamicCache(config=config).layers)
    except KeyError as cause:
        reason = f"transformers {transformers.__version__} has no cache for layers of type {cause}"
        raise _unsupported(config, reason, "a newer one may have") from cause


def quantizable_layers(config: PreTrainedConfig | None, max_cache_len: int | None = None) -> list[object]:
    """Return what `dynamic_layers` does, for a model of which some layers can be quantised.

    Args:
        config: the model's.
        max_cache_len: with it, the layers are those of transformers' own cache of fixed size.

    Raises:
        UnsupportedError: there are none, or the model takes no cache of this kind; says what to use.
    """
    if config is None:
        return []
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder, whose two attentions need a cache each"
        raise _unsupported(config, reason, "use kvquant.QuantizedEncoderDecoderCache(config=model.config, ...)")
    text = config.get_text_config(decoder=True)
    if not _takes_dynamic_cache(text):
        reason = f"its layers ({_layer_types(text, [])}) are cached by a class of its own, and it takes no other"
        raise _unsupported(config, reason, "generate without past_key_values, and it makes its own")
    layers = dynamic_layers(config)
    if not any(is_full_attention(layer) or sliding_window(layer) is not None for layer in layers):
        reason = f"none of its layers ({_layer_types(text, layers)}) holds keys and values alone, to be quantised"
        raise _unsupported(config, reason, "use transformers' DynamicCache(config=model.config)")
    return layers if max_cache_len is None else _static_layers(config, max_cache_len)


def _takes_dynamic_cache(config: PreTrainedConfig) -> bool:
    """Whether transformers says that a model takes its dynamic cache, which it tells by the name of the class."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")
    asked: Any = GenerationMixin._supports_default_dynamic_cache
    return bool(asked.__func__(SimpleNamespace(__name__=name)))


def _layer_types(config: PreTrainedConfig, layers: list[object]) -> str:
    named = getattr(config, "layer_types", None) or [type(layer).__name__ for layer in layers]
    return ", ".join(f"{count} of type {name}" for name, count in Counter(named).items()) or "of unknown types"


def _unsupported(config: PreTrainedConfig, *reasons: str) -> UnsupportedError:
    return UnsupportedError("a quantised cache", reasons, f"{config.model_type} models")


def _static_layers(config: PreTrainedConfig, max_cache_len: int) -> list[object]:
    """Return the layers that transformers' own cache of fixed size has for a model.

    Raises:
        UnsupportedError: it has none for it, or none that would be quantised.
    """
    try:
        layers = list(StaticCache(config=config, max_cache_len=max_cache_len).layers)
    except KeyError as cause:
        reason = f"transformers {transformers.__version__} has no cache of fixed size for layers of type {cause}"
        raise _unsupported(config, reason, "leave max_cache_len out") from cause
    if not any(map(is_full_attention, layers)):
        types = _layer_types(config.get_text_config(decoder=True), layers)
        reason = f"with max_cache_len full attention alone is quantised, and its layers are {types}"
        raise _unsupported(config, reason, "leave max_cache_len out, or use transformers' StaticCache")
    return layers


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
    """Return what the decoder of an encoder-decoder model would say of itself if it stood alone.

    Raises:
        UnsupportedError: it is no such model, or it puts another cache in the place of the one that it is given.
    """
    if not (config.is_encoder_decoder or getattr(config, "add_cross_attention", False)):
        reason = "it has no encoder whose states could be cached"
        raise _unsupported(config, reason, "use kvquant.QuantizedCache(config=model.config, ...)")
    if config.model_type in _REMAKES_CROSS_ATTENTION:
        reason = "its generate() makes the cache of the encoder's states anew, without the options of this one"
        raise _unsupported(config, reason, "generate without past_key_values")
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
    if any(getattr(text, name, None) not in (None, stated) for name in _OTHER_HEADS):
        return None
    if stated is not None:
        return int(stated)
    hidden, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    return int(hidden) // int(heads) if hidden and heads else None

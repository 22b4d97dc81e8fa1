"""``generate(cache_implementation="quantized")`` with kvquant's caches.

    model.generate(**inputs, cache_implementation="quantized", cache_config={"backend": "hqq", "nbits": 2})

transformers makes the cache of a `generate` in one method. `hook` wraps it: the method is asked for the cache that it
makes by default, and one of kvquant's takes the place of what it made. So whether there is a cache at all, and by which
name the model gets it, stays transformers' matter in every version.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

from transformers import Cache, EncoderDecoderCache, GenerationConfig, GenerationMixin, PreTrainedConfig

from kvquant.cache.cache import QuantizedCache
from kvquant.cache.encoder_decoder import QuantizedEncoderDecoderCache
from kvquant.engine.config import CacheConfig
from kvquant.engine.options import mapping
from kvquant.errors import BackendError

#: What `cache_implementation` calls it.
QUANTIZED = "quantized"

#: transformers' backend where `cache_config` names none.
DEFAULT_BACKEND = "quanto"

#: Options of transformers' own quantised cache; where one is None it has its default.
_OPTIONAL = ("nbits", "axis_key", "axis_value", "q_group_size", "residual_length")

_METHOD = "_prepare_cache_for_generation"

#: Our method, where it has taken the place of transformers'.
_ours: Callable[..., Any] | None = None
_hooked = False


def hook() -> None:
    """Have `generate` make kvquant's caches. Doing so again changes nothing."""
    global _ours, _hooked
    _hooked = True
    if _ours is None:
        _ours = _wrapped(getattr(GenerationMixin, _METHOD))
        setattr(GenerationMixin, _METHOD, _ours)


def is_hooked() -> bool:
    """Whether `generate` makes kvquant's caches."""
    return _hooked


def unhook() -> None:
    """Have `generate` make transformers' caches again."""
    global _ours, _hooked
    _hooked = False
    # Where somebody has wrapped our method in one of their own it stays, and does nothing.
    if _ours is not None and getattr(GenerationMixin, _METHOD) is _ours:
        setattr(GenerationMixin, _METHOD, _ours.__wrapped__)  # type: ignore[attr-defined]  # set by functools.wraps
        _ours = None


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return transformers' method with kvquant's caches."""

    @functools.wraps(original)
    def prepare(
        self: Any, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        def made_by(config: GenerationConfig) -> Any:
            return original(self, config, model_kwargs, *args, **kwargs)

        if not _hooked or generation_config.cache_implementation != QUANTIZED:
            return made_by(generation_config)
        default = copy.copy(generation_config)
        default.cache_implementation = None
        if _caches_in(model_kwargs):
            # In all rounds but the first a draft model is given its own cache, which is no contradiction.
            return made_by(default if generation_config.is_assistant else generation_config)
        model_config = self.config.get_text_config(decoder=True)
        result = made_by(default)
        if not _caches_in(model_kwargs):
            return made_by(generation_config)  # which says why there is none
        for name, cache in _caches_in(model_kwargs).items():
            model_kwargs[name] = _in_place_of(cache, generation_config.cache_config, model_config)
            if generation_config.is_assistant:
                model_kwargs[name].activate_past_recording()  # rejected tokens will be rolled back
        return result

    return prepare


def _caches_in(model_kwargs: dict[str, Any]) -> dict[str, Cache]:
    return {name: value for name, value in model_kwargs.items() if isinstance(value, Cache)}


def _in_place_of(cache: Cache, cache_config: object, model_config: PreTrainedConfig) -> Cache:
    """Return the quantised cache for a model that transformers would have given `cache`."""
    options, config = cache_options(cache_config, model_config)
    kind = QuantizedEncoderDecoderCache if isinstance(cache, EncoderDecoderCache) else QuantizedCache
    try:
        return kind.from_config(options, config)
    except BackendError as error:
        if not isinstance(cache_config, Mapping) or not {"backend", "preset"} & set(cache_config):
            error.add_note(f"cache_config names no backend, and transformers' default is {DEFAULT_BACKEND!r}.")
        raise


def cache_options(cache_config: object, model_config: PreTrainedConfig) -> tuple[CacheConfig, PreTrainedConfig]:
    """Return what a `cache_config` asks for: the cache's options, and the model's config.

    Args:
        cache_config: options of transformers' quantised cache or of `CacheConfig`, or ``{"preset": "kivi-2"}`` and
            options that override the preset's; None for none. Without a backend it has transformers' default, as
            existing scripts mean it; with a preset, which transformers does not know, kvquant's.
        model_config: the model's config, where `cache_config` has none of its own.

    Raises:
        UnknownOptionError, OptionValueError: an option that cannot be honoured.
    """
    options = dict(mapping("cache_config", {} if cache_config is None else cache_config))
    config = options.pop("config", None) or model_config
    options = {name: value for name, value in options.items() if value is not None or name not in _OPTIONAL}
    if "preset" in options:
        return CacheConfig.from_preset(options.pop("preset"), **options), config
    return CacheConfig.from_dict({"backend": DEFAULT_BACKEND, **options}), config

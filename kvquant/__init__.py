"""Keep a language model's key/value cache in few bits, with any quantisation method that is installed.

    from kvquant import QuantizedCache

    cache = QuantizedCache(backend="reference", nbits=4)
    model.generate(**inputs, past_key_values=cache)

Public names are loaded on first use, so that importing kvquant imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvquant._version import __version__

if TYPE_CHECKING:
    from kvquant.cache.cache import QuantizedCache
    from kvquant.cache.encoder_decoder import QuantizedEncoderDecoderCache
    from kvquant.engine.config import CacheConfig
    from kvquant.errors import KVQuantError
    from kvquant.registry import (
        Backend,
        TransformPlugin,
        get_backend,
        get_transform,
        list_backends,
        list_transforms,
        register,
        unregister,
    )

__all__ = [
    "QuantizedCache",
    "QuantizedEncoderDecoderCache",
    "CacheConfig",
    "list_backends",
    "get_backend",
    "list_transforms",
    "get_transform",
    "register",
    "unregister",
    "Backend",
    "TransformPlugin",
    "KVQuantError",
    "__version__",
]

_HOMES = {
    "QuantizedCache": "kvquant.cache.cache",
    "QuantizedEncoderDecoderCache": "kvquant.cache.encoder_decoder",
    "CacheConfig": "kvquant.engine.config",
    "list_backends": "kvquant.registry",
    "get_backend": "kvquant.registry",
    "list_transforms": "kvquant.registry",
    "get_transform": "kvquant.registry",
    "register": "kvquant.registry",
    "unregister": "kvquant.registry",
    "Backend": "kvquant.registry",
    "TransformPlugin": "kvquant.registry",
    "KVQuantError": "kvquant.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Key/value cache quantisation for Hugging Face models, with a backend plugin for every method.

    from kvquant import QuantizedCache

    cache = QuantizedCache(backend="reference", nbits=4)
    model.generate(**inputs, past_key_values=cache)

Names are imported when they are first used: ``import kvquant`` takes milliseconds and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kvquant._version import __version__

if TYPE_CHECKING:
    from kvquant.cache.cache import QuantizedCache
    from kvquant.engine.config import CacheConfig
    from kvquant.errors import KVQuantError
    from kvquant.registry import Backend, get_backend, list_backends, register, unregister

_MODULES = {
    "QuantizedCache": "kvquant.cache.cache",
    "CacheConfig": "kvquant.engine.config",
    "KVQuantError": "kvquant.errors",
    "Backend": "kvquant.registry",
    "get_backend": "kvquant.registry",
    "list_backends": "kvquant.registry",
    "register": "kvquant.registry",
    "unregister": "kvquant.registry",
}

__all__ = [
    "QuantizedCache",
    "CacheConfig",
    "list_backends",
    "get_backend",
    "register",
    "unregister",
    "Backend",
    "KVQuantError",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'kvquant' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

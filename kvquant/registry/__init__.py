"""From a name to a backend: what is installed, whether it can be used, and if not, what to do. Imports no torch.

The names of backends come from the metadata of installed distributions (`discovery`). A plugin's light module is
imported when its declaration is needed (`loader`), its quantizer and the library behind that when it is first used
(`backend`). Whatever goes wrong on the way becomes the availability of that one backend (`availability`).
"""

from kvquant.registry.availability import Availability
from kvquant.registry.backend import IN_PROCESS, Backend
from kvquant.registry.resolve import (
    ALLOW_VARIABLE,
    BLOCK_VARIABLE,
    find_backend,
    get_backend,
    list_backends,
    refresh,
    register,
    unregister,
)

__all__ = [
    "ALLOW_VARIABLE",
    "BLOCK_VARIABLE",
    "IN_PROCESS",
    "Availability",
    "Backend",
    "find_backend",
    "get_backend",
    "list_backends",
    "refresh",
    "register",
    "unregister",
]

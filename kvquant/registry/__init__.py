"""From a name to a backend or transform: what is installed, whether it can be used, and if not, what to do.

Imports no torch. Names come from the metadata of installed distributions (`discovery`). A plugin's light module is
imported when its declaration is needed (`loader`), what it makes and the library behind that when it is first used
(`found`). Whatever goes wrong on the way becomes the availability of that one plugin (`availability`). What is
different between the two kinds of plugins is in `kinds`, and the rest is the same for both.
"""

from kvquant.registry.availability import Availability
from kvquant.registry.backend import Backend
from kvquant.registry.found import IN_PROCESS
from kvquant.registry.public import (
    ALLOW_VARIABLE,
    BLOCK_VARIABLE,
    TRANSFORM_ALLOW_VARIABLE,
    TRANSFORM_BLOCK_VARIABLE,
    check_backend_name,
    check_transform_name,
    find_backend,
    find_transform,
    get_backend,
    get_transform,
    list_backends,
    list_transforms,
    refresh,
    register,
    unregister,
)
from kvquant.registry.transform import TransformPlugin

__all__ = [
    "ALLOW_VARIABLE",
    "BLOCK_VARIABLE",
    "IN_PROCESS",
    "TRANSFORM_ALLOW_VARIABLE",
    "TRANSFORM_BLOCK_VARIABLE",
    "Availability",
    "Backend",
    "TransformPlugin",
    "check_backend_name",
    "check_transform_name",
    "find_backend",
    "find_transform",
    "get_backend",
    "get_transform",
    "list_backends",
    "list_transforms",
    "refresh",
    "register",
    "unregister",
]

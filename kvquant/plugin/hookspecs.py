"""The hooks of kvquant, on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from kvquant.plugin.spec import BackendSpec
    from kvquant.plugin.transform import TransformSpec

PROJECT = "kvquant"

#: Groups of entry points, one for each hook; an entry point's name is that of the backend or transform.
BACKEND_GROUP = "kvquant.backends"
TRANSFORM_GROUP = "kvquant.transforms"

#: Version of this contract. It rises when a plugin written for the last one would no longer work.
API_VERSION = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def kvquant_register_backends() -> list[BackendSpec]:  # type: ignore[empty-body]  # pluggy reads only the signature
    """Declare the backends that this module provides.

    Must be cheap and must not import torch: it runs whenever backends are listed.

    Returns:
        One `BackendSpec` for each entry point that names this module, under the entry point's name.
    """


@hookspec
def kvquant_transforms() -> list[TransformSpec]:  # type: ignore[empty-body]  # pluggy reads only the signature
    """Declare the transforms that this module provides.

    Must be cheap and must not import torch: it runs whenever transforms are listed.

    Returns:
        One `TransformSpec` for each entry point that names this module, under the entry point's name.
    """

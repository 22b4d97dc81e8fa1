"""Looking up backends and transforms by name, and registering them in this process."""

from __future__ import annotations

from typing import Literal

from kvquant.errors import OptionValueError
from kvquant.plugin.spec import BackendSpec
from kvquant.plugin.transform import TransformSpec
from kvquant.registry.backend import Backend
from kvquant.registry.kinds import BACKEND, HOOKS, TRANSFORM
from kvquant.registry.resolve import Registry
from kvquant.registry.transform import TransformPlugin

BACKENDS = Registry(BACKEND, Backend)
TRANSFORMS = Registry(TRANSFORM, TransformPlugin)

BLOCK_VARIABLE = BACKEND.block_variable
ALLOW_VARIABLE = BACKEND.allow_variable
TRANSFORM_BLOCK_VARIABLE = TRANSFORM.block_variable
TRANSFORM_ALLOW_VARIABLE = TRANSFORM.allow_variable


# ------------------------------------------------------------------------------------------------ backends


def get_backend(name: str) -> Backend:
    """Return the backend of that name; imports its plugin's light module, not its library.

    Args:
        name: a backend's name in any case, or ``"distribution:name"``.

    Returns:
        The backend. A library that it needs may still be missing: `Backend.require` tells, and `Backend.create`.

    Raises:
        UnknownBackendError: nothing of that name is installed or registered.
        DuplicateBackendError: several distributions provide it; ``"distribution:name"`` chooses.
        BlockedBackendError: the environment forbids it.
        BrokenBackendError: its plugin fails to load, or (IncompatibleBackendError) is for another plugin API.
        OptionValueError: `name` is not a string.
    """
    return BACKENDS.get(name)


def find_backend(name: str) -> Backend:
    """Return the backend of that name, even a blocked or broken one, so that it can be looked at.

    Args:
        name: as for `get_backend`.

    Raises:
        UnknownBackendError, DuplicateBackendError, OptionValueError: as for `get_backend`.
    """
    return BACKENDS.find(name)


def check_backend_name(name: str) -> None:
    """Do nothing if a backend of that name is installed or registered, usable or not; imports nothing of it.

    Args:
        name: as for `get_backend`.

    Raises:
        UnknownBackendError, OptionValueError: as for `get_backend`.
    """
    BACKENDS.check_name(name)


def list_backends() -> list[Backend]:
    """Return every backend, usable or not, sorted by name; imports plugins' light modules, not their libraries.

    Installed backends appear once for each distribution that provides them, and those registered in this process in
    place of installed ones of the same name. `Backend.availability` says whether and why not.
    """
    return BACKENDS.all()


# ------------------------------------------------------------------------------------------------ transforms


def get_transform(name: str) -> TransformPlugin:
    """Return the transform of that name; imports its plugin's light module, not the transform itself, nor torch.

    Args:
        name: a transform's name in any case, or ``"distribution:name"``.

    Raises:
        UnknownTransformError: nothing of that name is installed or registered.
        DuplicateTransformError: several distributions provide it; ``"distribution:name"`` chooses.
        BlockedTransformError: the environment forbids it.
        BrokenTransformError: its plugin fails to load, or (IncompatibleTransformError) is for another plugin API.
        OptionValueError: `name` is not a string.
    """
    return TRANSFORMS.get(name)


def find_transform(name: str) -> TransformPlugin:
    """Return the transform of that name, even a blocked or broken one, so that it can be looked at.

    Args:
        name: as for `get_transform`.

    Raises:
        UnknownTransformError, DuplicateTransformError, OptionValueError: as for `get_transform`.
    """
    return TRANSFORMS.find(name)


def check_transform_name(name: str) -> None:
    """Do nothing if a transform of that name is installed or registered, usable or not; imports nothing of it.

    Args:
        name: as for `get_transform`.

    Raises:
        UnknownTransformError, OptionValueError: as for `get_transform`.
    """
    TRANSFORMS.check_name(name)


def list_transforms() -> list[TransformPlugin]:
    """Return every transform, usable or not, sorted by name, as `list_backends` does for backends."""
    return TRANSFORMS.all()


# ------------------------------------------------------------------------------------------------ both


def register(plugin: object, *, replace: bool = False) -> None:
    """Make backends and transforms known in this process, for example from a notebook.

    Args:
        plugin: a `BackendSpec` or `TransformSpec` (its factory may be the class itself), or any module or object with
            the hook ``kvquant_register_backends`` or ``kvquant_transforms``, or both.
        replace: whether to stand in for others of the same name, installed or registered.

    Raises:
        BackendSpecError, TransformSpecError: the declaration cannot work.
        IncompatibleBackendError, IncompatibleTransformError: it was made for another version of the plugin API.
        BackendExistsError, TransformExistsError: the name is taken and `replace` is false.
    """
    backends = [plugin] if isinstance(plugin, BackendSpec) else []
    transforms = [plugin] if isinstance(plugin, TransformSpec) else []
    if not backends and not transforms:
        brings_backends, brings_transforms = (hasattr(plugin, hook) for hook in HOOKS)
        if brings_transforms:
            transforms = TRANSFORMS.declared(plugin, HOOKS)
        if brings_backends or not brings_transforms:
            backends = BACKENDS.declared(plugin, HOOKS)
        if not backends and not transforms:
            asked = BACKENDS if brings_backends else TRANSFORMS
            besides = f" and no {TRANSFORM.name}" if brings_backends and brings_transforms else ""
            raise asked.refused(plugin, f"it declares no {asked.kind.name}{besides}")
    # All or none.
    BACKENDS.check_all(backends, replace=replace)
    TRANSFORMS.check_all(transforms, replace=replace)
    BACKENDS.add(backends)
    TRANSFORMS.add(transforms)


def unregister(name: str, *, kind: Literal["backend", "transform"] | None = None) -> None:
    """Forget a backend or transform that was registered in this process; an installed one of that name comes back.

    Caches that use it keep working.

    Args:
        name: its name, in any case.
        kind: whether it is a backend or a transform; None for whichever has the name, and the backend where both have.

    Raises:
        BackendNotRegisteredError, TransformNotRegisteredError: it was not registered.
        OptionValueError: there is no such kind.
    """
    if kind not in (BACKEND.name, TRANSFORM.name, None):
        raise OptionValueError("kind", kind, f"'{BACKEND.name}' or '{TRANSFORM.name}'")
    if kind is None and not BACKENDS.is_registered(name) and not TRANSFORMS.is_registered(name):
        known = sorted({*BACKENDS.registered(), *TRANSFORMS.registered()})
        raise BACKEND.errors.not_registered(name, known)
    is_backend = BACKENDS.is_registered(name) if kind is None else kind == BACKEND.name
    (BACKENDS if is_backend else TRANSFORMS).unregister(name)


def refresh() -> None:
    """Look for installed backends and transforms anew, for instance after an installation; registered ones stay."""
    BACKENDS.refresh()
    TRANSFORMS.refresh()

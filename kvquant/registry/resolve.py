"""Names to backends: `get_backend`, `list_backends`, `register`, and the environment's say in them."""

from __future__ import annotations

import os
from functools import cache, partial

from kvquant.errors import (
    BackendExistsError,
    BackendNotRegisteredError,
    BackendSpecError,
    BackendUnavailableError,
    BlockedBackendError,
    BrokenBackendError,
    DuplicateBackendError,
    IncompatibleBackendError,
    MissingRequirementError,
    OptionValueError,
    OutdatedRequirementError,
    UnknownBackendError,
)
from kvquant.plugin.hookspecs import API_VERSION
from kvquant.plugin.spec import BackendSpec
from kvquant.registry.availability import Availability, Problem, Status, missing_requirements
from kvquant.registry.backend import IN_PROCESS, Backend
from kvquant.registry.discovery import InstalledPlugin, installed_plugins, normalise_distribution
from kvquant.registry.hints import install_command, suggest
from kvquant.registry.loader import DeclarationError, declared, is_foreign, load
from kvquant.registry.validation import spec_problems

BLOCK_VARIABLE = "KVQUANT_BLOCK_BACKENDS"
ALLOW_VARIABLE = "KVQUANT_LOAD_BACKENDS"

_registered: dict[str, BackendSpec] = {}
_installed = cache(installed_plugins)
_load = cache(load)

_STATUS: dict[type[BackendUnavailableError], Status] = {
    MissingRequirementError: "missing",
    OutdatedRequirementError: "missing",
    IncompatibleBackendError: "incompatible",
    BrokenBackendError: "broken",
    DuplicateBackendError: "duplicate",
    BlockedBackendError: "blocked",
}


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
    backend = find_backend(name)
    if backend.availability.status != "missing":
        backend.require()
    return backend


def find_backend(name: str) -> Backend:
    """Return the backend of that name, even a blocked or broken one, so that it can be looked at.

    Args:
        name: as for `get_backend`.

    Raises:
        UnknownBackendError, DuplicateBackendError, OptionValueError: as for `get_backend`.
    """
    key = _key(name)
    distribution, _, plain = key.rpartition(":")
    if plain in _registered and distribution in ("", IN_PROCESS):
        return _registered_backend(_registered[plain])
    named = [plugin for plugin in _installed() if plugin.name == plain]
    if distribution:
        wanted = normalise_distribution(distribution)
        named = [plugin for plugin in named if normalise_distribution(plugin.distribution) == wanted]
    if not named:
        raise _unknown(name, key)
    usable = [plugin for plugin in named if not _blocked(plugin)]
    if len(usable) > 1:
        raise DuplicateBackendError(plain, [plugin.distribution for plugin in usable])
    return _backend(usable[0] if usable else named[0])


def list_backends() -> list[Backend]:
    """Return every backend, usable or not, sorted by name; imports plugins' light modules, not their libraries.

    Installed backends appear once for each distribution that provides them, and those registered in this process in
    place of installed ones of the same name. `Backend.availability` says whether and why not.
    """
    installed = [plugin for plugin in _installed() if plugin.name not in _registered]
    usable = [plugin for plugin in installed if not _blocked(plugin)]
    backends = [_registered_backend(spec) for spec in list(_registered.values())]
    for plugin in installed:
        rivals = [other.distribution for other in usable if other.name == plugin.name]
        several = plugin in usable and len(rivals) > 1
        backends.append(_backend(plugin, partial(DuplicateBackendError, plugin.name, rivals) if several else None))
    return sorted(backends, key=lambda backend: (backend.name, backend.distribution))


def register(backend: object, *, replace: bool = False) -> None:
    """Make backends known in this process, for example from a notebook.

    Args:
        backend: a `BackendSpec` (its factory may be the class itself), or any module or object with the hook
            ``kvquant_register_backends``.
        replace: whether to stand in for backends of the same name, installed or registered.

    Raises:
        BackendSpecError: the declaration cannot work.
        IncompatibleBackendError: it was made for another version of the plugin API.
        BackendExistsError: the name is taken and `replace` is false.
    """
    specs = [backend] if isinstance(backend, BackendSpec) else _declared(backend)
    taken = {plugin.name: plugin.distribution for plugin in _installed()} | dict.fromkeys(_registered, "this process")
    for position, spec in enumerate(specs):
        if is_foreign(spec):
            raise IncompatibleBackendError(spec.name, "this process", "", spec.api_version, API_VERSION)
        problems = spec_problems(spec)
        if not problems and spec.name in [other.name for other in specs[:position]]:
            problems = ["it is declared twice"]
        if problems:
            raise BackendSpecError(f"backend {spec.name!r}", problems)
        if spec.name in taken and not replace:
            raise BackendExistsError(spec.name, taken[spec.name])
    _registered.update({spec.name: spec for spec in specs})


def unregister(name: str) -> None:
    """Forget a backend that was registered in this process; an installed one of that name comes back.

    Caches that use it keep working.

    Args:
        name: its name, in any case.

    Raises:
        BackendNotRegisteredError: it was not registered.
    """
    if _registered.pop(_key(name).removeprefix(f"{IN_PROCESS}:"), None) is None:
        raise BackendNotRegisteredError(name, sorted(_registered))


def refresh() -> None:
    """Look for installed backends anew, for instance after an installation; registered ones stay."""
    _installed.cache_clear()
    _load.cache_clear()


def _key(name: str) -> str:
    if not isinstance(name, str):
        raise OptionValueError("backend", name, "the name of a backend")
    return name.strip().lower()


def _declared(backend: object) -> list[BackendSpec]:
    subject = f"{type(backend).__name__} object"
    try:
        specs = declared(backend)
    except DeclarationError as error:
        raise BackendSpecError(subject, [str(error)]) from error
    if not specs:
        raise BackendSpecError(subject, ["it declares no backend"])
    return specs


# ------------------------------------------------------------------------------------------------ one backend


def _backend(plugin: InstalledPlugin, duplicate: Problem | None = None) -> Backend:
    origin = (plugin.name, plugin.distribution, plugin.version)
    problem: Problem | None = _blocked(plugin)
    if problem:
        return Backend(*origin, _availability(problem), None, problem)
    loaded = _load(plugin)
    spec = loaded if isinstance(loaded, BackendSpec) else None
    if isinstance(loaded, BackendSpec):
        problem = duplicate or missing_requirements(loaded, plugin.distribution)
    else:
        problem = duplicate or loaded
    return Backend(*origin, _availability(problem), spec, problem)


def _registered_backend(spec: BackendSpec) -> Backend:
    problem = missing_requirements(spec, IN_PROCESS)
    return Backend(spec.name, IN_PROCESS, "", _availability(problem), spec, problem)


def _availability(problem: Problem | None) -> Availability:
    if problem is None:
        return Availability("ok")
    error = problem()
    return Availability(_STATUS[type(error)], error.reason, error.hint)


def _unknown(name: str, key: str) -> UnknownBackendError:
    usable = [plugin for plugin in _installed() if not _blocked(plugin)]
    names = sorted({plugin.name for plugin in usable} | set(_registered))
    alike = names
    if ":" in key:
        alike = names + [f"{plugin.distribution}:{plugin.name}".lower() for plugin in usable]
    suggestions = suggest(key, alike)
    return UnknownBackendError(name, names, suggestions, install_command([key, *suggestions], alike))


# ------------------------------------------------------------------------------------------------ the environment


def _blocked(plugin: InstalledPlugin) -> Problem | None:
    """Return what the environment has against `plugin`; asked anew each time, as the environment may change."""
    for variable, names_block in ((BLOCK_VARIABLE, True), (ALLOW_VARIABLE, False)):
        value = os.environ.get(variable, "")
        named = {_environment_name(item) for item in value.split(",") if item.strip()}
        is_named = not named.isdisjoint((plugin.name, _environment_name(f"{plugin.distribution}:{plugin.name}")))
        if named and is_named == names_block:
            return partial(BlockedBackendError, plugin.name, variable, value, listed=names_block)
    return None


def _environment_name(item: str) -> str:
    distribution, colon, name = item.strip().lower().rpartition(":")
    return f"{normalise_distribution(distribution)}{colon}{name}"

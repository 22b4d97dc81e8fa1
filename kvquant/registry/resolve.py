"""Backends by name: those that are installed, and those registered in-process, by one path."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field
from typing import Any, cast

from kvquant import errors
from kvquant.plugin.capabilities import Capabilities
from kvquant.plugin.quantizer import Quantizer
from kvquant.plugin.spec import BackendSpec, Scheme
from kvquant.registry.availability import Availability, check_requirements
from kvquant.registry.discovery import IN_PROCESS, Candidate, discover
from kvquant.registry.hints import install_hint
from kvquant.registry.loader import IncompatiblePluginError, check_spec, collect, load

BLOCK_VARIABLE, LOAD_VARIABLE = "KVQUANT_BLOCK_BACKENDS", "KVQUANT_LOAD_BACKENDS"


@dataclass(frozen=True)
class Backend:
    """A backend, usable or not.

    Attributes:
        name: what users write.
        distribution: who provides it, ``"in-process"`` for one registered by `register`.
        version: that distribution's version.
        availability: whether it can be used, and if not why.
        spec: its declaration; None if it could not be read.
    """

    name: str
    distribution: str
    version: str
    availability: Availability
    spec: BackendSpec | None = field(repr=False)

    @property
    def capabilities(self) -> Capabilities:
        """What it can do.

        Raises:
            BackendUnavailableError: its declaration could not be read.
        """
        if self.spec is None:
            raise self._unavailable()
        return self.spec.capabilities

    def require(self) -> None:
        """Check that the backend can be used.

        Raises:
            BackendUnavailableError: saying why not and what to do.
        """
        if not self.availability.ok:
            raise self._unavailable()

    def create(self, scheme: Scheme) -> Quantizer:
        """Make the object that does the work; its library is imported here, for the first time.

        Raises:
            BackendUnavailableError: it cannot be used.
            PluginError: its factory could not be imported.
            Whatever the factory raises for options that it does not like.
        """
        self.require()
        factory = cast(BackendSpec, self.spec).factory
        if isinstance(factory, str):
            module, _, attribute = factory.partition(":")
            try:
                factory = getattr(importlib.import_module(module), attribute)
            except (Exception, SystemExit) as cause:
                raise errors.PluginError(
                    f"backend {self.name!r} of {self.distribution} {self.version} could not be started: importing "
                    f"{factory} failed: {type(cause).__name__}: {cause}"
                ) from cause
        return cast(Quantizer, factory(scheme))

    def _unavailable(self) -> errors.BackendUnavailableError:
        state = self.availability
        return errors.BackendUnavailableError(self.name, state.status, state.reason, state.hint)


# ------------------------------------------------------------------------------------------------ the registry

_in_process: dict[str, BackendSpec] = {}
_candidates: list[Candidate] | None = None
_loaded: dict[Candidate, Backend] = {}


def refresh() -> None:
    """Forget what was discovered, so that the next look sees what has been installed since."""
    global _candidates
    _candidates = None
    _loaded.clear()


def register(backend: BackendSpec | Any, *, replace: bool = False) -> None:
    """Add a backend to this process, for notebooks and tests.

    Args:
        backend: a `BackendSpec`, or any object or module with the hook `kvquant_register_backends`.
        replace: whether it may take the place of one registered in-process before.

    Raises:
        PluginError: it does not fit the plugin contract.
        DuplicateBackendError: the name is taken.
    """
    specs = [backend] if isinstance(backend, BackendSpec) else collect(backend, repr(backend))
    for spec in specs:
        check_spec(spec)
    installed = {candidate.name: candidate.distribution for candidate in _discovered()}
    checked = [spec for spec in specs if isinstance(spec, BackendSpec)]
    for spec in checked:
        if spec.name in installed:
            raise errors.DuplicateBackendError(spec.name, [installed[spec.name], IN_PROCESS])
        if spec.name in _in_process and not replace:
            raise errors.DuplicateBackendError(spec.name, [IN_PROCESS])
    _in_process.update({spec.name: spec for spec in checked})


def unregister(name: str) -> None:
    """Take back what `register` added.

    Raises:
        UnknownBackendError: no backend of that name was registered in-process.
    """
    if name.lower() not in _in_process:
        raise errors.UnknownBackendError(name, sorted(_in_process))
    del _in_process[name.lower()]


def list_backends() -> list[Backend]:
    """Return every backend, usable or not, sorted by name; no backend's library is imported."""
    candidates = _discovered()
    names = [candidate.name for candidate in candidates]
    backends = [_backend(candidate, duplicates=names.count(candidate.name)) for candidate in candidates]
    backends += [Backend(name, IN_PROCESS, "", _availability(spec), spec) for name, spec in _in_process.items()]
    return sorted(backends, key=lambda backend: (backend.name, backend.distribution))


def get_backend(name: str) -> Backend:
    """Return a backend by name, upper or lower case, or by ``"distribution:name"`` where two have the same.

    A backend whose library is missing is returned, so that it can be looked at; `Backend.require` and
    `Backend.create` refuse it.

    Raises:
        UnknownBackendError: there is none of that name.
        DuplicateBackendError: two distributions have one, and the name does not say which.
        BackendUnavailableError: it is blocked, broken or made for another plugin API.
    """
    wanted, chosen = name.strip().lower(), ""
    if ":" in wanted:
        chosen, _, wanted = wanted.partition(":")
    matching = [
        backend
        for backend in list_backends()
        if backend.name == wanted and (not chosen or _normal(backend.distribution) == _normal(chosen))
    ]
    if not matching:
        known = sorted({backend.name for backend in list_backends()})
        raise errors.UnknownBackendError(name, known, install_hint(wanted))
    if len(matching) > 1:
        raise errors.DuplicateBackendError(wanted, [backend.distribution for backend in matching])
    backend = matching[0]
    if chosen and backend.availability.status == "duplicate":
        candidate = next(c for c in _discovered() if (c.name, c.distribution) == (wanted, backend.distribution))
        backend = _backend(candidate, duplicates=1)
    if backend.availability.status not in ("ok", "missing"):
        backend.require()
    return backend


def _discovered() -> list[Candidate]:
    global _candidates
    if _candidates is None:
        _candidates = discover()
    return _candidates


def _backend(candidate: Candidate, duplicates: int) -> Backend:
    blocked = _blocked(candidate.name)
    if blocked is not None:
        return Backend(candidate.name, candidate.distribution, candidate.version, blocked, None)
    backend = _loaded.get(candidate) or _load(candidate)
    _loaded[candidate] = backend
    if duplicates > 1 and backend.availability.ok:
        state = Availability(
            "duplicate",
            f"{duplicates} distributions have a backend of this name",
            f"choose with '{candidate.distribution}:{candidate.name}'",
        )
        return Backend(candidate.name, candidate.distribution, candidate.version, state, backend.spec)
    return backend


def _load(candidate: Candidate) -> Backend:
    spec: BackendSpec | None = None
    try:
        spec = load(candidate)
        state = check_requirements(spec)
    except IncompatiblePluginError as error:
        newer = isinstance(error.version, int) and error.version > 1
        hint = "upgrade kvquant" if newer else f"upgrade {candidate.distribution}"
        state = Availability("incompatible", str(error), hint)
    except errors.PluginError as error:
        state = Availability("broken", str(error), f"report it to the makers of {candidate.distribution}")
    return Backend(candidate.name, candidate.distribution, candidate.version, state, spec)


def _availability(spec: BackendSpec) -> Availability:
    return _blocked(spec.name) or check_requirements(spec)


def _blocked(name: str) -> Availability | None:
    """Say whether the user's environment keeps a backend out; its plugin is then not even imported."""
    if name in _names(BLOCK_VARIABLE):
        return Availability("blocked", f"{BLOCK_VARIABLE} names it", f"take it out of {BLOCK_VARIABLE}")
    allowed = _names(LOAD_VARIABLE)
    if allowed and name not in allowed:
        return Availability("blocked", f"{LOAD_VARIABLE} is set and does not name it", f"add it to {LOAD_VARIABLE}")
    return None


def _names(variable: str) -> set[str]:
    return {name.strip().lower() for name in os.environ.get(variable, "").split(",") if name.strip()}


def _normal(distribution: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return distribution.lower().replace("_", "-").replace(".", "-")

"""Backends that cannot be found, declared or used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from kvquant.errors.base import listing
from kvquant.errors.plugins import (
    AnyPluginError,
    BlockedPluginError,
    BrokenPluginError,
    DuplicatePluginError,
    IncompatiblePluginError,
    PluginExistsError,
    PluginFactoryError,
    PluginImportError,
    PluginNotRegisteredError,
    PluginSpecError,
    UnavailablePluginError,
    UnknownPluginError,
)


class BackendError(AnyPluginError):
    """A backend, or the declaration of one, is not what was hoped for."""

    kind: ClassVar[str] = "backend"
    product: ClassVar[str] = "quantizer"


class UnknownBackendError(UnknownPluginError, BackendError):
    """No installed backend has that name."""


class BackendUnavailableError(UnavailablePluginError, BackendError):
    """An installed backend cannot be used."""


class DuplicateBackendError(DuplicatePluginError, BackendUnavailableError):
    """Several distributions provide a backend of that name."""


class BlockedBackendError(BlockedPluginError, BackendUnavailableError):
    """An environment variable forbids the backend."""


class BrokenBackendError(BrokenPluginError, BackendUnavailableError):
    """A backend's plugin fails to load."""


class IncompatibleBackendError(IncompatiblePluginError, BrokenBackendError):
    """A backend's plugin was written for another version of the plugin API."""


class MissingRequirementError(BackendUnavailableError):
    """A distribution that the backend needs is not installed.

    Attributes:
        requirements: all that stands in the way, as ``(requirement, installed version or None)``.
    """

    status = "missing"

    def __init__(self, name: str, requirements: Iterable[tuple[str, str | None]], hint: str) -> None:
        self.requirements = tuple(requirements)
        unmet = [
            f"{requirement} ({'not installed' if installed is None else f'{installed} is installed'})"
            for requirement, installed in self.requirements
        ]
        super().__init__(name, f"it needs {listing(unmet)}", hint)


class OutdatedRequirementError(MissingRequirementError):
    """Every distribution that the backend needs is installed, but not all of them recent enough."""


class BackendImportError(PluginImportError, BackendUnavailableError):
    """A backend's quantizer failed to import, or a library that it needs; that error is the `__cause__`."""


class BackendFactoryError(PluginFactoryError, BackendError):
    """A backend's factory raised; its own error is the `__cause__`.

    Attributes:
        scheme: what was asked for.
    """

    def __init__(self, name: str, distribution: str, version: str, scheme: object, problem: str) -> None:
        self.scheme = scheme
        super().__init__(name, distribution, version, scheme, problem)


class BackendSpecError(PluginSpecError, BackendError):
    """A backend's declaration cannot work; nothing was registered."""


class BackendExistsError(PluginExistsError, BackendError):
    """A backend was registered under a name that is taken."""


class BackendNotRegisteredError(PluginNotRegisteredError, BackendError):
    """A backend was unregistered that had not been registered in this process."""

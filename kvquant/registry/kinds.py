"""The kinds of plugins: all that is different between backends and transforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from kvquant import errors
from kvquant.errors.plugins import (
    BlockedPluginError,
    BrokenPluginError,
    DuplicatePluginError,
    IncompatiblePluginError,
    PluginExistsError,
    PluginNotRegisteredError,
    PluginSpecError,
    UnknownPluginError,
)
from kvquant.plugin import hookspecs
from kvquant.plugin.spec import BackendSpec
from kvquant.plugin.transform import TransformSpec
from kvquant.registry.availability import Problem, missing_requirements
from kvquant.registry.hints import INSTALL_COMMANDS, OTHER_NAMES, Hints
from kvquant.registry.validation import spec_problems, transform_problems


class Spec(Protocol):
    """What declarations of all kinds have."""

    @property
    def name(self) -> str:
        """What users write."""
        ...  # an interface

    @property
    def factory(self) -> str | Callable[[Any], Any]:
        """What makes the object that does the work."""
        ...  # an interface

    @property
    def summary(self) -> str:
        """One line for listings."""
        ...  # an interface

    @property
    def url(self) -> str:
        """Home page."""
        ...  # an interface

    @property
    def api_version(self) -> int:
        """The plugin API that it was written for."""
        ...  # an interface


S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Errors:
    """The errors of one kind."""

    unknown: type[UnknownPluginError]
    duplicate: type[DuplicatePluginError]
    blocked: type[BlockedPluginError]
    broken: type[BrokenPluginError]
    incompatible: type[IncompatiblePluginError]
    spec: type[PluginSpecError]
    exists: type[PluginExistsError]
    not_registered: type[PluginNotRegisteredError]


@dataclass(frozen=True)
class Kind(Generic[S]):
    """A kind of plugins.

    Attributes:
        name: in a word: ``"backend"``.
        group: its group of entry points.
        hook: its hook.
        spec: the type of its declarations.
        problems: says what is wrong with a declaration.
        unmet: says what a declaration needs and is not installed; takes the declaration and its distribution.
        errors: its errors.
        hints: what kvquant knows of plugins that are not installed.
    """

    name: str
    group: str
    hook: str
    spec: type[S]
    problems: Callable[[S], list[str]]
    unmet: Callable[[S, str], Problem | None]
    errors: Errors
    hints: Hints

    @property
    def block_variable(self) -> str:
        """The environment variable that names plugins which are not to be loaded."""
        return f"KVQUANT_BLOCK_{self.name.upper()}S"

    @property
    def allow_variable(self) -> str:
        """The environment variable that names the only plugins which are to be loaded."""
        return f"KVQUANT_LOAD_{self.name.upper()}S"


def _nothing_unmet(spec: TransformSpec, distribution: str) -> None:  # noqa: ARG001 # what a transform needs, pip installs
    return None


BACKEND = Kind(
    name="backend",
    group=hookspecs.BACKEND_GROUP,
    hook=hookspecs.kvquant_register_backends.__name__,
    spec=BackendSpec,
    problems=spec_problems,
    unmet=missing_requirements,
    errors=Errors(
        unknown=errors.UnknownBackendError,
        duplicate=errors.DuplicateBackendError,
        blocked=errors.BlockedBackendError,
        broken=errors.BrokenBackendError,
        incompatible=errors.IncompatibleBackendError,
        spec=errors.BackendSpecError,
        exists=errors.BackendExistsError,
        not_registered=errors.BackendNotRegisteredError,
    ),
    hints=Hints(INSTALL_COMMANDS, OTHER_NAMES),
)

TRANSFORM = Kind(
    name="transform",
    group=hookspecs.TRANSFORM_GROUP,
    hook=hookspecs.kvquant_transforms.__name__,
    spec=TransformSpec,
    problems=transform_problems,
    unmet=_nothing_unmet,
    errors=Errors(
        unknown=errors.UnknownTransformError,
        duplicate=errors.DuplicateTransformError,
        blocked=errors.BlockedTransformError,
        broken=errors.BrokenTransformError,
        incompatible=errors.IncompatibleTransformError,
        spec=errors.TransformSpecError,
        exists=errors.TransformExistsError,
        not_registered=errors.TransformNotRegisteredError,
    ),
    hints=Hints(),
)

HOOKS = (BACKEND.hook, TRANSFORM.hook)

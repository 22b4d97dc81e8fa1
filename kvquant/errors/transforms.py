"""Transforms that cannot be found, declared or used."""

from __future__ import annotations

from typing import ClassVar

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


class TransformError(AnyPluginError):
    """A transform, or the declaration of one, is not what was hoped for."""

    kind: ClassVar[str] = "transform"
    product: ClassVar[str] = "transform"


class UnknownTransformError(UnknownPluginError, TransformError):
    """No installed transform has that name."""


class TransformUnavailableError(UnavailablePluginError, TransformError):
    """An installed transform cannot be used."""


class DuplicateTransformError(DuplicatePluginError, TransformUnavailableError):
    """Several distributions provide a transform of that name."""


class BlockedTransformError(BlockedPluginError, TransformUnavailableError):
    """An environment variable forbids the transform."""


class BrokenTransformError(BrokenPluginError, TransformUnavailableError):
    """A transform's plugin fails to load."""


class IncompatibleTransformError(IncompatiblePluginError, BrokenTransformError):
    """A transform's plugin was written for another version of the plugin API."""


class TransformImportError(PluginImportError, TransformUnavailableError):
    """A transform failed to import, or a library that it needs; that error is the `__cause__`."""


class HeadDimError(TransformError, ValueError):
    """A transform cannot do heads of that size; its own error is the `__cause__`.

    Attributes:
        name: the transform's name.
        head_dim: channels of a head.
        problem: what stands in the way and what would work, in the transform's words.
    """

    def __init__(self, name: str, head_dim: int, problem: str) -> None:
        self.name, self.head_dim, self.problem = name, head_dim, problem
        super().__init__(f"transform {name!r} cannot do head_dim={head_dim}: {problem}")


class TransformFactoryError(PluginFactoryError, TransformError):
    """A transform's factory raised something other than a ValueError; its own error is the `__cause__`.

    Attributes:
        head_dim: what was asked for.
    """

    def __init__(self, name: str, distribution: str, version: str, head_dim: int, problem: str) -> None:
        self.head_dim = head_dim
        super().__init__(name, distribution, version, f"head_dim={head_dim}", problem)


class TransformFailedError(TransformError, RuntimeError):
    """A transform raised while it was applied or undone; its own error is the `__cause__`.

    Attributes:
        name: the transform's name.
        method: what it was doing.
        problem: what went wrong, on one line.
    """

    def __init__(self, name: str, method: str, problem: str) -> None:
        self.name, self.method, self.problem = name, method, problem
        super().__init__(f"transform {name!r} failed in its method {method}: {problem}")


class TransformContractError(TransformError, TypeError):
    """A transform returned something other than the plugin contract promises.

    Attributes:
        name: the transform's name.
        problem: what is wrong with what it returned.
    """

    def __init__(self, name: str, problem: str) -> None:
        self.name, self.problem = name, problem
        super().__init__(
            f"transform {name!r} broke the plugin contract: {problem}. This is a bug in the plugin, not in your code."
        )


class TransformSpecError(PluginSpecError, TransformError):
    """A transform's declaration cannot work; nothing was registered."""


class TransformExistsError(PluginExistsError, TransformError):
    """A transform was registered under a name that is taken."""


class TransformNotRegisteredError(PluginNotRegisteredError, TransformError):
    """A transform was unregistered that had not been registered in this process."""

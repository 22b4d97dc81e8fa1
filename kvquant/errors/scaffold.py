"""New plugins that cannot be written."""

from __future__ import annotations

from kvquant.errors.base import KVQuantError, origin
from kvquant.errors.config import ConfigError


class PluginNameError(ConfigError):
    """A name that a new plugin cannot have; nothing was written.

    Attributes:
        name: what was given.
        problem: what is wrong with it.
        suggestion: a name close to it that works.
    """

    def __init__(self, name: str, problem: str, suggestion: str) -> None:
        self.name, self.problem, self.suggestion = name, problem, suggestion
        super().__init__(f"{name!r} cannot be the name of a new plugin: {problem}. One that works: {suggestion}")


class PluginNameTakenError(PluginNameError):
    """A name that an installed backend or transform has, or its distribution.

    Attributes:
        distribution, version: who has it.
        kind: ``"backend"`` or ``"transform"``.
    """

    def __init__(self, name: str, distribution: str, version: str, suggestion: str, kind: str = "backend") -> None:
        self.distribution, self.version, self.kind = distribution, version, kind
        super().__init__(name, f"a {kind} of that name comes with {origin(distribution, version)}", suggestion)


class ProjectFolderError(KVQuantError, OSError):
    """A folder that a new project cannot be written to.

    Attributes:
        path: the folder.
        problem: what stands in the way.
    """

    def __init__(self, path: object, problem: str) -> None:
        self.path, self.problem = str(path), problem
        super().__init__(f"cannot write a project to {self.path!r}: {problem}. Choose another place with --directory.")

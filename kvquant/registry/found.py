"""A plugin of any kind, as it was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from operator import attrgetter
from typing import Any, ClassVar, Generic, cast

from kvquant.errors.plugins import PluginImportError
from kvquant.registry.availability import Availability, Problem
from kvquant.registry.guard import PluginError, call_plugin
from kvquant.registry.kinds import S

#: The distribution of what was registered in this process.
IN_PROCESS = "in-process"


@dataclass(frozen=True)
class Found(Generic[S]):
    """A plugin, whether or not it can be used.

    Attributes:
        name: what users write, in lower case.
        distribution: name of the distribution that brings it, or ``"in-process"``.
        version: version of that distribution, or an empty string.
        availability: whether it can be used, and if not why and what to do.
        spec: its declaration; None where it could not be had (broken, incompatible) or was not wanted (blocked).
    """

    import_error: ClassVar[type[PluginImportError]]

    name: str
    distribution: str
    version: str
    availability: Availability
    spec: S | None
    _problem: Problem | None = field(default=None, repr=False, compare=False)

    @property
    def qualified_name(self) -> str:
        """``"distribution:name"``, which names this one even where several distributions have the name."""
        return f"{self.distribution}:{self.name}"

    def require(self) -> None:
        """Do nothing if it can be used.

        Raises:
            BackendUnavailableError, TransformUnavailableError: it cannot; the message says why and what to do.
        """
        if self._problem is not None:
            raise self._problem()

    def _made(self, asked: object) -> Any:
        """Import the factory, with whatever library is behind it, and call it.

        Raises:
            UnavailablePluginError: the plugin cannot be used, or its factory, or a library that it needs, failed to
                import.
            PluginError: the factory raised something else.
        """
        self.require()
        factory = self._factory()
        try:
            return call_plugin(lambda: factory(asked))
        except PluginError as error:
            # Factories import their library when they are called, so this is where a missing one shows.
            if isinstance(error.__cause__, ImportError):
                raise self._import_error(error.problem) from error.__cause__
            raise

    def _factory(self) -> Callable[[Any], Any]:
        factory = self.spec.factory if self.spec else ""
        if not isinstance(factory, str):
            return factory
        module, _, path = factory.partition(":")
        try:
            return call_plugin(lambda: cast("Callable[[Any], Any]", attrgetter(path)(import_module(module))))
        except PluginError as error:
            raise self._import_error(error.problem) from error.__cause__

    def _import_error(self, problem: str) -> PluginImportError:
        factory = self.spec.factory if self.spec else ""
        text = factory if isinstance(factory, str) else getattr(factory, "__qualname__", repr(factory))
        return self.import_error(self.name, self.distribution, self.version, text, problem)

"""A backend as the rest of kvquant sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from operator import attrgetter
from typing import Any, cast

from kvquant.errors import BackendContractError, BackendFactoryError, BackendImportError
from kvquant.plugin.capabilities import Capabilities
from kvquant.plugin.quantizer import OpaqueQuantizer, Quantizer
from kvquant.plugin.spec import BackendSpec, Scheme
from kvquant.registry.availability import Availability, Problem
from kvquant.registry.guard import PluginError, call_plugin

#: The distribution of backends that were registered in this process.
IN_PROCESS = "in-process"


@dataclass(frozen=True)
class Backend:
    """A backend, whether or not it can be used.

    Attributes:
        name: what users write, in lower case.
        distribution: name of the distribution that brings it, or ``"in-process"``.
        version: version of that distribution, or an empty string.
        availability: whether it can be used, and if not why and what to do.
        spec: its declaration; None where it could not be had (broken, incompatible) or was not wanted (blocked).
    """

    name: str
    distribution: str
    version: str
    availability: Availability
    spec: BackendSpec | None
    _problem: Problem | None = field(default=None, repr=False, compare=False)

    @property
    def qualified_name(self) -> str:
        """``"distribution:name"``, which names this backend even where several distributions have the name."""
        return f"{self.distribution}:{self.name}"

    @property
    def capabilities(self) -> Capabilities:
        """What it can do.

        Raises:
            BackendUnavailableError: there is no declaration to tell.
        """
        if self.spec is None:
            self.require()
        # A backend without a declaration has a problem, which `require` has raised.
        return cast("BackendSpec", self.spec).capabilities

    def require(self) -> None:
        """Do nothing if the backend can be used.

        Raises:
            BackendUnavailableError: it cannot; the message says why and what to do.
        """
        if self._problem is not None:
            raise self._problem()

    def create(self, scheme: Scheme) -> Quantizer:
        """Import the backend's factory, with whatever library is behind it, and make a quantizer.

        Args:
            scheme: what the quantizer is asked to do; not checked against `capabilities` here.

        Raises:
            BackendUnavailableError: the backend cannot be used.
            BackendImportError: its factory, or a library that it needs, failed to import.
            BackendFactoryError: its factory raised something else.
            BackendContractError: its factory returned something that is no quantizer.
        """
        self.require()
        factory = self._factory()
        try:
            quantizer = call_plugin(lambda: factory(scheme))
        except PluginError as error:
            # Factories import their library when they are called, so this is where a missing one shows.
            if isinstance(error.__cause__, ImportError):
                raise self._import_error(error.problem) from error.__cause__
            raise BackendFactoryError(
                self.name, self.distribution, self.version, scheme, error.problem
            ) from error.__cause__
        expected = OpaqueQuantizer if self.capabilities.formats == ("opaque",) else Quantizer
        if not isinstance(quantizer, expected):
            methods = "quantize and dequantize" if expected is OpaqueQuantizer else "quantize"
            kind = type(quantizer).__name__
            raise BackendContractError(self.name, f"its factory returned a {kind} without the methods {methods}")
        return quantizer

    def _factory(self) -> Callable[[Scheme], Any]:
        factory = self.spec.factory if self.spec else ""
        if not isinstance(factory, str):
            return factory
        module, _, path = factory.partition(":")
        try:
            return call_plugin(lambda: cast("Callable[[Scheme], Any]", attrgetter(path)(import_module(module))))
        except PluginError as error:
            raise self._import_error(error.problem) from error.__cause__

    def _import_error(self, problem: str) -> BackendImportError:
        factory = self.spec.factory if self.spec else ""
        text = factory if isinstance(factory, str) else getattr(factory, "__qualname__", repr(factory))
        return BackendImportError(self.name, self.distribution, self.version, text, problem)

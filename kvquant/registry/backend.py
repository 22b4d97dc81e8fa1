"""A backend as the rest of kvquant sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from kvquant.errors import BackendContractError, BackendFactoryError, BackendImportError
from kvquant.plugin.capabilities import Capabilities
from kvquant.plugin.quantizer import OpaqueQuantizer, Quantizer
from kvquant.plugin.spec import BackendSpec, Scheme
from kvquant.registry.found import Found
from kvquant.registry.guard import PluginError


@dataclass(frozen=True)
class Backend(Found[BackendSpec]):
    """A backend, whether or not it can be used.

    Attributes:
        name: what users write, in lower case.
        distribution: name of the distribution that brings it, or ``"in-process"``.
        version: version of that distribution, or an empty string.
        availability: whether it can be used, and if not why and what to do.
        spec: its declaration; None where it could not be had (broken, incompatible) or was not wanted (blocked).
    """

    import_error = BackendImportError

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
        try:
            quantizer = self._made(scheme)
        except PluginError as error:
            raise BackendFactoryError(
                self.name, self.distribution, self.version, scheme, error.problem
            ) from error.__cause__
        expected = OpaqueQuantizer if self.capabilities.formats == ("opaque",) else Quantizer
        if not isinstance(quantizer, expected):
            methods = "quantize and dequantize" if expected is OpaqueQuantizer else "quantize"
            kind = type(quantizer).__name__
            raise BackendContractError(self.name, f"its factory returned a {kind} without the methods {methods}")
        return quantizer

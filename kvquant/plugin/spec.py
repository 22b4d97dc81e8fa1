"""A backend's declaration, and the scheme that its factory is given. Strings and numbers only, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvquant.plugin.capabilities import Capabilities

Axis = Literal["channel", "token"]


@dataclass(frozen=True)
class Scheme:
    """What one quantizer is asked to do.

    Attributes:
        nbits: bits a code takes, 1 to 8.
        axis: ``"channel"`` (a row is `group_size` consecutive tokens of one channel of one head) or ``"token"`` (a row
            is `group_size` consecutive channels of one token of one head). Rows look alike; most backends ignore it.
        group_size: numbers in a row.
        options: the backend's own options, as the user gave them.
    """

    nbits: int
    axis: Axis
    group_size: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Requirement:
    """A distribution that a backend needs.

    Attributes:
        distribution: its name on the package index, e.g. ``"optimum-quanto"``.
        minimum: lowest version that works, or None for any.
    """

    distribution: str
    minimum: str | None = None


@dataclass(frozen=True)
class BackendSpec:
    """A backend's declaration.

    Attributes:
        name: what users write; equal to the entry point's name. Lower case.
        factory: ``"module:Class"``, imported on first use, or (in-process registration) a callable. It is called as
            ``factory(scheme)`` and returns a `Quantizer`.
        capabilities: what the backend can do; everything else is refused before it is asked.
        requires: distributions that must be installed; checked from metadata, never by importing.
        install_hint: one line that tells a person what to do when a requirement is missing.
        summary: one line for listings.
        url: home page.
        api_version: the `API_VERSION` that the plugin was written for; one that does not say was written for the first.
    """

    name: str
    factory: str | Callable[[Scheme], Any]
    capabilities: Capabilities
    requires: tuple[Requirement, ...] = ()
    install_hint: str = ""
    summary: str = ""
    url: str = ""
    api_version: int = 1

"""Whether a plugin can be used, from metadata alone: no library is imported to find out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Literal, cast

from kvquant.errors import MissingRequirementError, OutdatedRequirementError, listing
from kvquant.errors.plugins import UnavailablePluginError
from kvquant.plugin.spec import BackendSpec, Requirement
from kvquant.registry.hints import INSTALL_COMMANDS

Status = Literal["ok", "missing", "incompatible", "broken", "blocked", "duplicate"]

#: Makes the error that says why a plugin cannot be used. Errors are made anew each time, because one that is kept
#: keeps alive every frame that it went through, with all tensors in them.
Problem = Callable[[], UnavailablePluginError]


@dataclass(frozen=True)
class Availability:
    """Whether a backend or transform can be used.

    Attributes:
        status: ``"ok"``; ``"missing"`` (a library that it needs is not installed, or too old); ``"incompatible"``
            (written for another plugin API); ``"broken"`` (its plugin fails to load); ``"blocked"`` (by an environment
            variable); ``"duplicate"`` (several distributions provide it).
        reason: why it cannot be used; empty if it can.
        hint: the next step; empty if none is needed.
    """

    status: Status
    reason: str = ""
    hint: str = ""

    @property
    def ok(self) -> bool:
        """Whether it can be used."""
        return self.status == "ok"

    @classmethod
    def of(cls, problem: Problem | None) -> Availability:
        """Return what stands in the way as an availability; "ok" where nothing does."""
        if problem is None:
            return cls("ok")
        error = problem()
        return cls(cast("Status", error.status), error.reason, error.hint)


def missing_requirements(spec: BackendSpec, distribution: str) -> Problem | None:
    """Return what stands in the way among the distributions that `spec` requires, or None.

    Args:
        spec: a valid declaration.
        distribution: where it comes from.
    """
    unmet = []
    for requirement in spec.requires:
        installed = installed_version(requirement.distribution)
        if installed is None or _is_older(installed, requirement.minimum):
            unmet.append((requirement_text(requirement), installed))
    if not unmet:
        return None
    absent = any(installed is None for _, installed in unmet)
    return partial(
        MissingRequirementError if absent else OutdatedRequirementError, spec.name, unmet, _hint(spec, distribution)
    )


def _hint(spec: BackendSpec, distribution: str) -> str:
    if spec.install_hint:
        return spec.install_hint
    if distribution == "kvquant" and spec.name in INSTALL_COMMANDS:
        return INSTALL_COMMANDS[spec.name]
    return f"install {listing(map(requirement_text, spec.requires))}"


def requirement_text(requirement: Requirement) -> str:
    """Return ``"optimum-quanto>=0.2.5"``."""
    return f"{requirement.distribution}>={requirement.minimum}" if requirement.minimum else requirement.distribution


def installed_version(distribution: str) -> str | None:
    """Return the version, an empty string where metadata lacks it, or None where the distribution is not installed."""
    try:
        return metadata.version(distribution) or ""
    except metadata.PackageNotFoundError:
        return None
    except KeyError:  # from Python 3.14 on, for metadata without a version
        return ""


def _is_older(installed: str, minimum: str | None) -> bool:
    if minimum is None:
        return False
    from packaging.version import InvalidVersion, Version

    try:
        return Version(installed) < Version(minimum)
    except InvalidVersion:
        # A home-made build. Refusing it would be a guess; if it is too old, the library itself will say so.
        return False

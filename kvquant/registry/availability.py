"""Whether a backend can be used, and if not why and what to do; from metadata, without importing its library."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Literal

from packaging.version import InvalidVersion, Version

from kvquant.plugin.spec import BackendSpec, Requirement

Status = Literal["ok", "missing", "incompatible", "broken", "blocked", "duplicate"]


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used.

    Attributes:
        status: ``"ok"``; ``"missing"`` (a library is not installed, or too old); ``"incompatible"`` (made for another
            plugin API); ``"broken"`` (its plugin fails); ``"blocked"`` (by the user); ``"duplicate"`` (two
            distributions claim the name).
        reason: why not, in one sentence; empty when it can.
        hint: what to do about it; may be empty.
    """

    status: Status = "ok"
    reason: str = ""
    hint: str = ""

    @property
    def ok(self) -> bool:
        """Whether the backend can be used."""
        return self.status == "ok"

    def __str__(self) -> str:
        if self.ok:
            return "ok"
        return f"{self.status}: {self.reason}" + (f"; {self.hint}" if self.hint else "")


def check_requirements(spec: BackendSpec) -> Availability:
    """Say whether everything that a backend requires is installed, in the versions that it needs."""
    problems = [problem for requirement in spec.requires if (problem := _problem(requirement))]
    return Availability("missing", " and ".join(problems), spec.install_hint) if problems else Availability()


def _problem(requirement: Requirement) -> str:
    try:
        installed = importlib.metadata.version(requirement.distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.distribution} is not installed"
    if requirement.minimum is None:
        return ""
    try:
        fine = Version(installed) >= Version(requirement.minimum)
    except InvalidVersion:
        return f"{requirement.distribution} has a version that cannot be compared, {installed!r}"
    return "" if fine else f"{requirement.distribution} {installed} is older than {requirement.minimum}"

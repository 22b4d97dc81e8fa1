"""What came of the checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "not applicable"]


class CheckFailed(AssertionError):  # noqa: N818 # reads as the sentence that it is, as pytest's do
    """A plugin does not do what a check demands; the text says what it did instead."""


class NotApplicable(Exception):  # noqa: N818 # no error: a check has nothing to look at
    """A check has nothing to look at; the text says why."""


@dataclass(frozen=True)
class Outcome:
    """What came of one check.

    Attributes:
        check: the check's name.
        title: what it demands, one line.
        status: ``"passed"``, ``"failed"`` or ``"not applicable"``.
        reason: of a failure: the first case that failed, what happened, and how many did. Of a check that does not
            apply: why. Of one that passed: what was left out, if anything.
        cases: how many were tried: combinations of bits, axis, group size, type and device, or of head size, type and
            device of a transform; 1 where the check is of the plugin itself.
        seconds: how long it took.
    """

    check: str
    title: str
    status: Status
    reason: str
    cases: int
    seconds: float


class _Outcomes(ABC):
    """What reports of both kinds tell from their outcomes."""

    outcomes: tuple[Outcome, ...]

    @property
    @abstractmethod
    def subject(self) -> str:
        """What was checked, e.g. ``"backend 'foo'"``."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain builtins."""

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The checks that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    @property
    def ok(self) -> bool:
        """Whether none failed."""
        return not self.failures

    def raise_for_failures(self) -> None:
        """Do nothing if no check failed.

        Raises:
            CheckFailed: some did; all their reasons.
        """
        if not self.ok:
            lines = [f"{outcome.check}: {outcome.reason}" for outcome in self.failures]
            raise CheckFailed(f"{self.subject} fails {len(lines)} checks:\n" + "\n".join(lines))


@dataclass(frozen=True)
class Report(_Outcomes):
    """What came of all checks of one backend.

    Attributes:
        backend, distribution, version: what was checked.
        options: the backend's options that it was checked with.
        nbits: the widths that it was checked at.
        outcomes: one for each check, in order.
    """

    backend: str
    distribution: str
    version: str
    options: Mapping[str, Any]
    nbits: tuple[int, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def subject(self) -> str:
        """What was checked."""
        return f"backend {self.backend!r}"

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain builtins, as ``kvquant check-plugin --json`` prints it."""
        return {
            "kind": "backend",
            "backend": self.backend,
            "distribution": self.distribution,
            "version": self.version or None,
            "options": dict(self.options),
            "nbits": list(self.nbits),
            "ok": self.ok,
            "checks": [asdict(outcome) for outcome in self.outcomes],
        }


@dataclass(frozen=True)
class TransformReport(_Outcomes):
    """What came of all checks of one transform.

    Attributes:
        transform, distribution, version: what was checked.
        head_dims: the sizes of heads that it was checked with; others that were tried it refuses.
        outcomes: one for each check, in order.
    """

    transform: str
    distribution: str
    version: str
    head_dims: tuple[int, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def subject(self) -> str:
        """What was checked."""
        return f"transform {self.transform!r}"

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain builtins, as ``kvquant check-plugin --json`` prints it."""
        return {
            "kind": "transform",
            "transform": self.transform,
            "distribution": self.distribution,
            "version": self.version or None,
            "head_dims": list(self.head_dims),
            "ok": self.ok,
            "checks": [asdict(outcome) for outcome in self.outcomes],
        }

"""What came of the checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "not applicable"]


class CheckFailed(AssertionError):  # noqa: N818 # reads as the sentence that it is, as pytest's do
    """A backend does not do what a check demands; the text says what it did instead."""


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
        cases: combinations of bits, axis, group size, type and device that were tried.
        seconds: how long it took.
    """

    check: str
    title: str
    status: Status
    reason: str
    cases: int
    seconds: float


@dataclass(frozen=True)
class Report:
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
            raise CheckFailed(f"backend {self.backend!r} fails {len(lines)} checks:\n" + "\n".join(lines))

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain builtins, as ``kvquant check-plugin --json`` prints it."""
        return {
            "backend": self.backend,
            "distribution": self.distribution,
            "version": self.version or None,
            "options": dict(self.options),
            "nbits": list(self.nbits),
            "ok": self.ok,
            "checks": [asdict(outcome) for outcome in self.outcomes],
        }

"""What a check is, and how one is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kvquant.errors import KVQuantError, UnknownOptionError, listing
from kvquant.registry.guard import describe
from kvquant.testing.outcomes import CheckFailed, NotApplicable, Outcome, Status
from kvquant.testing.subject import Case
from kvquant.testing.surroundings import same_chances

#: How often a check runs; see `Subject.cases` and `TransformSubject.cases`. Once where it is the plugin itself.
Per = Literal["combination", "size", "width", "dtype", "usual", "backend", "transform"]


class Tried(Protocol):
    """What checks run on: a plugin, and the cases in which it is tried."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices that it can be tried on here."""
        ...  # an interface

    def cases(self, per: str) -> Sequence[Any]:
        """Return the cases to try."""
        ...  # an interface

    def leave_out(self, cases: Iterable[Any]) -> None:
        """Leave these cases out from now on."""
        ...  # an interface


@dataclass(frozen=True)
class Check:
    """One demand on a plugin.

    Attributes:
        name: short, for tables and for picking it.
        title: the demand in one line.
        per: what it runs for; `run` takes a case, or the subject where that is the plugin itself.
        basic: whether a combination that fails here is left out of all later checks, which could only fail over the
            same thing again.
        run: raises `CheckFailed`, or anything else, if the plugin does not meet it, and `NotApplicable` if there is
            nothing to look at; what it returns, if anything, says what was left out.
    """

    name: str
    title: str
    per: Per
    basic: bool
    run: Callable[[Any], str | None]

    def __str__(self) -> str:
        return self.name

    def __call__(self, subject: Tried) -> Outcome:
        """Run the check for all of its cases and return what came of it."""
        start = time.perf_counter()
        try:
            cases = [None] if self.per in ("backend", "transform") else some_cases(subject, self.per)
        except NotApplicable as nothing:
            return Outcome(self.name, self.title, "not applicable", str(nothing), 0, 0.0)
        failures: list[tuple[object, str]] = []
        beside: list[str] = []
        apply = 0
        for case in cases:
            try:
                with same_chances():
                    note = self.run(subject if case is None else case)
                beside += [note] if note else []
                apply += 1
            except NotApplicable as nothing:
                beside.append(str(nothing))
            except CheckFailed as failure:
                failures.append((case, str(failure)))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001 # even SystemExit is a failure here, and not an end
                # Of kvquant's own errors about a plugin, the part that is about it.
                problem = getattr(error, "problem", None) if isinstance(error, KVQuantError) else None
                failures.append((case, problem or f"raised {describe(error)}"))
        if self.basic:
            subject.leave_out(case for case, _ in failures if case is not None)
        status, reason = _verdict(failures, beside, len(cases), applies=apply > 0)
        return Outcome(self.name, self.title, status, reason, len(cases), round(time.perf_counter() - start, 3))


def _verdict(failures: list[tuple[object, str]], beside: list[str], cases: int, *, applies: bool) -> tuple[Status, str]:
    if failures:
        case, reason = failures[0]
        shown = reason if case is None else f"{case}: {reason}"
        others = f" ({len(failures)} of {cases} cases fail)" if cases > 1 else ""
        return "failed", shown + others
    unique = "; ".join(dict.fromkeys(beside))
    return ("passed" if applies else "not applicable"), unique


def check(name: str, per: Per, *, basic: bool = False) -> Callable[[Callable[[Any], str | None]], Check]:
    """Make a check of a function; the first line of its docstring is what it demands."""

    def make(function: Callable[[Any], str | None]) -> Check:
        title = (function.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        return Check(name, title, per, basic, function)

    return make


def picked(every: Sequence[Check], names: str | Iterable[str] | None) -> list[str]:
    """Return the names of the checks to run; None picks all.

    Raises:
        UnknownOptionError: no check has such a name.
    """
    known = [check.name for check in every]
    wanted = known if names is None else [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in known:
            raise UnknownOptionError("check", name, known)
    return wanted


def run_checks(
    every: Sequence[Check], wanted: Sequence[str], subject: Tried, progress: Callable[[str], None] | None
) -> tuple[Outcome, ...]:
    """Run the wanted checks, and unreported the basic ones among the others; `progress` is called before each."""
    outcomes: list[Outcome] = []
    for check in every:
        if progress:
            progress(check.name)
        if check.name in wanted:
            outcomes.append(check(subject))
        elif check.basic:
            check(subject)
    return tuple(outcomes)


def some_cases(subject: Tried, per: str) -> Sequence[Any]:
    """Return the cases to try, of which there are some.

    Raises:
        NotApplicable: there are none; the text says why.
    """
    cases = subject.cases(per)
    if not cases:
        why = "every combination failed an earlier check" if subject.devices else "no declared device is here"
        raise NotApplicable(why)
    return cases


def require(truth: object, reason: str) -> None:
    """Raise CheckFailed with `reason` unless `truth`."""
    if not truth:
        raise CheckFailed(reason)


def require_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckFailed unless two results (see `Result.parts`) are the same in every bit, saying by how much."""
    found = []
    for name in sorted(one.keys() | other.keys()):
        mine, yours = one.get(name), other.get(name)
        if mine is None or yours is None or mine.shape != yours.shape or mine.dtype != yours.dtype:
            found.append(f"{name} (in kind)")
        elif not torch.equal(mine.nan_to_num(), yours.nan_to_num()):
            apart = (mine.detach().double() - yours.detach().double()).abs().nan_to_num()
            found.append(f"{name} ({int((apart > 0).sum())} of {apart.numel()}, by up to {float(apart.max()):.3g})")
    require(not found, f"{what}: {listing(found)} differ")


def needs_determinism(case: Case) -> None:
    """Raise NotApplicable where results cannot be compared bit by bit."""
    if not case.backend.capabilities.deterministic:
        raise NotApplicable("the backend declares that it is not deterministic")

"""Runs the checks on a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kvquant import registry
from kvquant.errors import OptionValueError, UnsupportedError, listing
from kvquant.plugin.spec import BackendSpec
from kvquant.registry import Backend
from kvquant.registry.public import BACKENDS
from kvquant.testing.check import picked, run_checks
from kvquant.testing.checks import CHECKS
from kvquant.testing.outcomes import Report
from kvquant.testing.subject import Subject


def check_backend(
    backend: str | Backend | BackendSpec,
    *,
    nbits: Iterable[float] | None = None,
    options: Mapping[str, Any] | None = None,
    checks: Iterable[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Check a backend against the plugin contract.

    Args:
        backend: the name of one that is installed or registered, or a declaration, which need not be registered.
        nbits: widths to check; None for all that are declared.
        options: the backend's own options to check it with; they must fit all of `nbits`.
        checks: names of the checks to run; None for all. The basic ones among the others run as well, unreported,
            because they leave out combinations that do not work at all.
        progress: called with each check's name before it runs.

    Returns:
        What came of each check. Nothing is raised for a check that fails.

    Raises:
        UnknownBackendError, BackendUnavailableError: there is no such backend, or it cannot be used.
        BackendSpecError: the declaration cannot work.
        OptionValueError, UnsupportedError: `nbits` or `options` are not declared.
        UnknownOptionError: there is no check of a name in `checks`.
    """
    wanted = picked(CHECKS, checks)
    subject = make_subject(backend, nbits=nbits, options=options)
    outcomes = run_checks(CHECKS, wanted, subject, progress)
    found = subject.backend
    return Report(found.name, found.distribution, found.version, subject.options, subject.nbits, outcomes)


def make_subject(
    backend: str | Backend | BackendSpec,
    *,
    nbits: Iterable[float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Subject:
    """Return what the checks run on; arguments and errors as for `check_backend`."""
    found = _found(backend)
    found.require()
    declared = found.capabilities
    widths = tuple(declared.nbits if nbits is None else nbits)
    wrong = [width for width in widths if width not in declared.nbits]
    if wrong or not widths:
        raise OptionValueError("nbits", wrong[0] if wrong else widths, f"one or more of {listing(declared.nbits)}")
    unknown = [name for name in options or {} if name not in declared.options]
    if unknown:
        known = listing(declared.options)
        raise UnsupportedError(f"backend {found.name!r}", [f"option {unknown[0]!r} is unknown to it; known: {known}"])
    return Subject(found, tuple(map(int, widths)), dict(options or {}))


def _found(backend: str | Backend | BackendSpec) -> Backend:
    if isinstance(backend, Backend):
        return backend
    return BACKENDS.usable(backend) if isinstance(backend, BackendSpec) else registry.get_backend(backend)

"""Runs the checks on a transform."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvquant import registry
from kvquant.plugin.transform import TransformSpec
from kvquant.registry import TransformPlugin
from kvquant.registry.public import TRANSFORMS
from kvquant.testing.check import picked, run_checks
from kvquant.testing.outcomes import TransformReport
from kvquant.testing.transforms.checks import CHECKS
from kvquant.testing.transforms.subject import TransformSubject


def check_transform(
    transform: str | TransformPlugin | TransformSpec,
    *,
    checks: Iterable[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> TransformReport:
    """Check a transform against the plugin contract.

    Args:
        transform: the name of one that is installed or registered, or a declaration, which need not be registered.
        checks: names of the checks to run; None for all. The basic ones among the others run as well, unreported.
        progress: called with each check's name before it runs.

    Returns:
        What came of each check. Nothing is raised for a check that fails.

    Raises:
        UnknownTransformError, TransformUnavailableError: there is no such transform, or it cannot be used.
        TransformSpecError: the declaration cannot work.
        UnknownOptionError: no check of a name in `checks`.
    """
    wanted = picked(CHECKS, checks)
    subject = make_transform_subject(transform)
    outcomes = run_checks(CHECKS, wanted, subject, progress)
    found = subject.plugin
    return TransformReport(found.name, found.distribution, found.version, tuple(sorted(subject.head_dims)), outcomes)


def make_transform_subject(transform: str | TransformPlugin | TransformSpec) -> TransformSubject:
    """Return what the checks run on; argument and errors as for `check_transform`."""
    if isinstance(transform, TransformPlugin):
        transform.require()
        return TransformSubject(transform)
    if isinstance(transform, TransformSpec):
        return TransformSubject(TRANSFORMS.usable(transform))
    return TransformSubject(registry.get_transform(transform))

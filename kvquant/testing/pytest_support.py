"""The checks as pytest tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import pytest

from kvquant.testing.check import Check, Tried
from kvquant.testing.checks import CHECKS
from kvquant.testing.outcomes import CheckFailed
from kvquant.testing.runner import make_subject
from kvquant.testing.subject import Subject
from kvquant.testing.transforms import checks as transforms
from kvquant.testing.transforms.runner import make_transform_subject
from kvquant.testing.transforms.subject import TransformSubject


class BoundCheck:
    """One check of one plugin; call it to run it."""

    def __init__(self, check: Check, subject: Callable[[], Tried]) -> None:
        """Bind `check` to the plugin that `subject` finds, which is looked up when the check runs."""
        self._check, self._subject = check, subject

    def __str__(self) -> str:
        return self._check.name

    def __call__(self) -> None:
        """Run the check.

        Raises:
            CheckFailed: the plugin does not meet it.
            pytest.skip.Exception: the check does not apply.
            BackendError, TransformError: the plugin cannot be had. That is no reason to skip.
        """
        outcome = self._check(self._subject())
        if outcome.status == "failed":
            raise CheckFailed(f"{outcome.title}. {outcome.reason}")
        if outcome.status == "not applicable":
            pytest.skip(outcome.reason)


def parametrize_checks(
    backend: str, *, nbits: Iterable[float] | None = None, options: Mapping[str, Any] | None = None
) -> pytest.MarkDecorator:
    """Run a test once for each check of the conformance kit; the test takes `check` and calls it.

        @parametrize_checks("foo")
        def test_conforms(check):
            check()

    Args:
        backend: the backend's name; it is looked up when a check runs.
        nbits: widths to check; None for all that are declared.
        options: the backend's own options to check it with.
    """
    return pytest.mark.parametrize("check", bound_checks(backend, nbits=nbits, options=options), ids=str)


def bound_checks(
    backend: str, *, nbits: Iterable[float] | None = None, options: Mapping[str, Any] | None = None
) -> list[BoundCheck]:
    """Return every check of a backend, ready to be called; arguments as for `parametrize_checks`."""
    widths = None if nbits is None else tuple(nbits)

    @cache
    def subject() -> Subject:
        # One for all checks: combinations that fail a basic one are left out of the others.
        return make_subject(backend, nbits=widths, options=options)

    return [BoundCheck(check, subject) for check in CHECKS]


def parametrize_transform_checks(transform: str) -> pytest.MarkDecorator:
    """Run a test once for each check of a transform; the test takes `check` and calls it, as for a backend.

    Args:
        transform: the transform's name; it is looked up when a check runs.
    """
    return pytest.mark.parametrize("check", bound_transform_checks(transform), ids=str)


def bound_transform_checks(transform: str) -> list[BoundCheck]:
    """Return every check of a transform, ready to be called."""

    @cache
    def subject() -> TransformSubject:
        return make_transform_subject(transform)

    return [BoundCheck(check, subject) for check in transforms.CHECKS]

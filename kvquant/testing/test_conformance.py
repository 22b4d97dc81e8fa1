"""The conformance suite: ``pytest --pyargs kvquant.testing --kvquant-backend NAME``."""

from __future__ import annotations

import pytest

from kvquant.testing.options import parse_options, parse_widths
from kvquant.testing.pytest_support import BoundCheck, bound_checks


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each check, for the backend that the command line names."""
    given = metafunc.config.getoption
    backend = given("--kvquant-backend")
    if not backend:
        raise pytest.UsageError("which backend? Add --kvquant-backend NAME; 'kvquant list-backends' shows them.")
    checks = bound_checks(
        backend, nbits=parse_widths(given("--kvquant-nbits")), options=parse_options(given("--kvquant-option"))
    )
    metafunc.parametrize("check", checks, ids=str)


def test_conforms(check: BoundCheck) -> None:
    """The backend meets one demand of the plugin contract."""
    check()

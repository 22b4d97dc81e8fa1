"""The conformance suite: ``pytest --pyargs kvquant.testing --kvquant-backend NAME``."""

from __future__ import annotations

import pytest

from kvquant.engine.typed import parse_options, parse_widths
from kvquant.errors import KVQuantError
from kvquant.testing.pytest_support import BoundCheck, bound_checks
from kvquant.testing.runner import make_subject


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each check, for the backend that the command line names."""
    given = metafunc.config.getoption
    backend = given("--kvquant-backend")
    if not backend:
        raise pytest.UsageError("which backend? Add --kvquant-backend NAME; 'kvquant list-backends' shows them.")
    try:
        widths, options = parse_widths(given("--kvquant-nbits")), parse_options(given("--kvquant-option"))
        make_subject(backend, nbits=widths, options=options)  # so that a wrong name is one error, and not one a check
    except KVQuantError as error:
        raise pytest.UsageError(str(error)) from None
    checks = bound_checks(backend, nbits=widths, options=options)
    metafunc.parametrize("check", checks, ids=str)


def test_conforms(check: BoundCheck) -> None:
    """The backend meets one demand of the plugin contract."""
    check()

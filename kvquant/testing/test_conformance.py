"""The conformance suite: ``pytest --pyargs kvquant.testing --kvquant-backend NAME``, or --kvquant-transform."""

from __future__ import annotations

import pytest

from kvquant.engine.typed import parse_options, parse_widths
from kvquant.errors import KVQuantError
from kvquant.testing.pytest_support import BoundCheck, bound_checks, bound_transform_checks
from kvquant.testing.runner import make_subject
from kvquant.testing.transforms.runner import make_transform_subject


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each check, for the backend or the transform that the command line names."""
    given = metafunc.config.getoption
    backend, transform = given("--kvquant-backend"), given("--kvquant-transform")
    if not backend and not transform:
        raise pytest.UsageError(
            "which plugin? Add --kvquant-backend NAME ('kvquant list-backends' shows them) or --kvquant-transform NAME "
            "('kvquant list-transforms')."
        )
    if backend and transform:
        raise pytest.UsageError("one plugin a run: either --kvquant-backend or --kvquant-transform, and not both.")
    if transform and (given("--kvquant-nbits") is not None or given("--kvquant-option")):
        raise pytest.UsageError("--kvquant-nbits and --kvquant-option are for backends; a transform has none.")
    try:
        if transform:
            make_transform_subject(transform)  # so that a wrong name is one error, and not one a check
            checks = bound_transform_checks(transform)
        else:
            widths, options = parse_widths(given("--kvquant-nbits")), parse_options(given("--kvquant-option"))
            make_subject(backend, nbits=widths, options=options)
            checks = bound_checks(backend, nbits=widths, options=options)
    except KVQuantError as error:
        raise pytest.UsageError(str(error)) from None
    metafunc.parametrize("check", checks, ids=str)


def test_conforms(check: BoundCheck) -> None:
    """The plugin meets one demand of the plugin contract."""
    check()

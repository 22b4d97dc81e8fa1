"""Tells pytest the options of the conformance suite. Light: pytest imports it wherever kvquant is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options; see ``pytest --help``."""
    group = parser.getgroup("kvquant", "kvquant's conformance suite: pytest --pyargs kvquant.testing")
    group.addoption("--kvquant-backend", metavar="NAME", help="the backend to check")
    group.addoption("--kvquant-transform", metavar="NAME", help="the transform to check")
    group.addoption(
        "--kvquant-nbits", metavar="N[,N...]", help="widths to check; without it, all that the backend declares"
    )
    group.addoption(
        "--kvquant-option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="an option of the backend to check it with; may be given again",
    )

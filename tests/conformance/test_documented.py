"""Every check of the kit is documented for those who must pass it."""

from pathlib import Path

import pytest

from kvquant.testing.checks import CHECKS

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_every_check_has_its_row(check):
    """With its demand, word for word."""
    assert f"| `{check.name}` | {check.title} |" in PAGE


def test_names_are_unique():
    """They pick a check."""
    assert len({check.name for check in CHECKS}) == len(CHECKS)

"""Numbers of tokens and bytes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.errors import OptionValueError
from kvquant.evaluation.sizes import at_least, at_most, bytes_at_least, parse_bytes, parse_contexts, parse_tokens


def test_contexts_are_numbers_or_thousands() -> None:
    """4k is 4096."""
    assert parse_contexts("4k, 100,32K") == (4096, 100, 32768)
    assert parse_tokens("context", "128k") == 131072


@pytest.mark.parametrize("text", ["", "4m", "k", "0", "-1", "4k,4096", "1.5k"])
def test_bad_contexts_are_refused(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(OptionValueError, match=r"such as 4k,32768|each length once"):
        parse_contexts(text)


@pytest.mark.parametrize(
    ("text", "count"), [("24GB", 24 * 10**9), ("24 GiB", 24 << 30), ("1.5kib", 1536), ("500MB", 5 * 10**8), ("7b", 7)]
)
def test_bytes_have_units_of_1000_or_1024(text: str, count: int) -> None:
    """GB and GiB are not the same."""
    assert parse_bytes("memory", text) == count


@pytest.mark.parametrize("text", ["", "24", "24G", "-1GB", "0GB", "GB", "1e9B"])
def test_bad_bytes_are_refused(text: str) -> None:
    """A number without a unit could mean anything."""
    with pytest.raises(OptionValueError, match=r"24GB or 22\.5GiB"):
        parse_bytes("memory", text)


@given(value=st.floats(1e-6, 1e9), digits=st.integers(2, 6))
def test_a_bound_that_is_shown_holds(value: float, digits: int) -> None:
    """Who takes what is shown keeps it, and it is no further off than its digits have it."""
    low, high = at_least(value, digits), at_most(value, digits)
    assert float(low) >= value * (1 - 1e-9)
    assert float(high) <= value * (1 + 1e-9)
    assert float(low) - float(high) <= 2 * value * 10 ** (1 - digits)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [(2.26625, "2.267", "2.266"), (2.5, "2.5", "2.5"), (0.1 + 0.2, "0.3", "0.3"), (0, "0", "0")],
)
def test_bounds_as_people_write_them(value: float, low: str, high: str) -> None:
    """Numbers of few digits as they are, whatever their sums were rounded to."""
    assert (at_least(value), at_most(value)) == (low, high)


@given(count=st.integers(1, 1 << 45))
def test_bytes_that_are_shown_to_be_enough_are(count: int) -> None:
    """Read again, they are no fewer."""
    assert parse_bytes("memory", bytes_at_least(count)) >= count

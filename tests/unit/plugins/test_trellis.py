"""The trellis backend: the best path, the error that theory expects, options."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvquant_plugins import trellis
from tests.unit.engine.test_trellis import by_definition
from tests.unit.plugins.conftest import quantizer, read


@pytest.mark.parametrize("states", list(trellis.TAPS))
@pytest.mark.parametrize("nbits", [1, 2])
def test_no_path_is_better(nbits: int, states: int) -> None:
    """Brute force over all rows of codes."""
    length = 8 // nbits
    rows = torch.randn(40, length)
    table = torch.tensor(trellis.levels(nbits, states))
    codes, indices = trellis.search(rows, table, trellis.TAPS[states])
    every = list(itertools.product(range(2**nbits), repeat=length))
    paths = torch.tensor([by_definition(list(path), trellis.TAPS[states]) for path in every])
    best = (table[paths][:, None] - rows).square().sum(2).amin(0)
    torch.testing.assert_close((table[indices.long()] - rows).square().sum(1), best, rtol=1e-5, atol=1e-6)
    expected = [by_definition(row, trellis.TAPS[states]) for row in codes.tolist()]
    assert indices.tolist() == expected


@pytest.mark.parametrize(("nbits", "scalar"), [(1, 0.3634), (2, 0.1175), (3, 0.03454)])
def test_normal_numbers_leave_less_than_the_best_levels_for_single_numbers(nbits: int, scalar: float) -> None:
    """Which leave `scalar` (Max 1960), and more states leave less; no code leaves less than 2**(-2 * nbits)."""
    rows = torch.randn(4000, 64)
    left = [
        float((read(quantizer("trellis", nbits, states=states).quantize(rows)) - rows).square().mean())
        for states in trellis.TAPS
    ]
    assert left == sorted(left, reverse=True)
    assert left[0] < 0.9 * scalar
    assert left[-1] > 2.0 ** (-2 * nbits)


@pytest.mark.parametrize("nbits", [1, 2, 3])
def test_every_level_is_the_mean_of_the_numbers_that_take_it(nbits: int) -> None:
    """So the tables in the backend are those that the iteration ends with."""
    table = torch.tensor(trellis.levels(nbits, 8))
    rows = torch.randn(4000, 64)
    indices = trellis.search(rows, table, trellis.TAPS[8])[1].long()
    for level, number in enumerate(table):
        mine = rows[indices == level]
        assert abs(float(mine.mean() - number)) < 0.01 + 4 * float(mine.std()) / len(mine) ** 0.5


def test_rows_far_from_zero_need_an_offset() -> None:
    """Which they have on the channel axis, or where it is asked for."""
    rows = torch.randn(50, 64) + 10
    with_offset, without = (
        float((read(quantizer("trellis", 2, offset=offset).quantize(rows)) - rows).square().mean())
        for offset in (True, False)
    )
    assert with_offset < 0.1
    assert without > 10 * with_offset


@pytest.mark.parametrize(("option", "value"), [("states", 5), ("states", "8"), ("states", 8.0), ("offset", "no")])
def test_other_values_are_refused(option: str, value: object) -> None:
    """By name, with what would work."""
    with pytest.raises(ValueError, match=f"{option}={value!r} cannot work: expected"):
        quantizer("trellis", 2, **{option: value})

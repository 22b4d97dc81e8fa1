"""The yardsticks of the kit, against results known otherwise."""

from __future__ import annotations

import pytest
import torch

from kvquant.testing import data


@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_symmetric_rounding_has_the_noise_of_an_even_grid(nbits: int) -> None:
    """Bennett's step / sqrt(12), so that the ratio is one."""
    rows = torch.rand(200, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    step = data.step(rows, nbits)[:, None]
    reach = rows.abs().amax(1, keepdim=True)
    read = ((rows + reach) / step).round() * step - reach
    assert data.error_ratio(rows, read, data.even_grid_error(rows, nbits)) == pytest.approx(1, abs=0.02)
    finer = (2 ** (nbits + 1) - 1) / (2**nbits - 1)
    assert data.error_ratio(rows, read, data.even_grid_error(rows, nbits + 1)) == pytest.approx(finer, rel=0.02)


def test_the_nearest_entry_is_found_in_any_order_of_the_table() -> None:
    """By comparing with every entry."""
    rows = data.gaussian(10, 33)
    table = torch.tensor([0.9, -1.0, 0.0, 0.3, -0.2], dtype=torch.float64)
    scale = torch.linspace(0.5, 3, 10, dtype=torch.float64)
    levels = table * scale[:, None]
    expected = levels.gather(1, (rows[:, :, None] - levels[:, None, :]).abs().argmin(2))
    assert torch.equal(data.nearest_in_table(rows, table, scale), expected)


def test_the_best_scale_is_at_least_as_good_as_the_largest_magnitude() -> None:
    """And better where a table has its entries in the middle."""
    rows = data.gaussian(50, 64)
    table = torch.tensor([-1.0, -0.1, 0.1, 1.0], dtype=torch.float64)
    plain = data.rms(data.nearest_in_table(rows, table, rows.abs().amax(1)) - rows)
    best = data.best_scale_error(rows, table)
    assert (best <= plain).all()
    assert (best < plain * 0.95).any()


def test_rows_are_the_same_every_time() -> None:
    """So that a failure can be looked into."""
    assert torch.equal(data.spread(5, 7), data.spread(5, 7))
    assert not torch.equal(data.gaussian(5, 7, seed=1), data.gaussian(5, 7))
    assert (data.one_outlier(6, 9).abs().amax(1) == 100).all()

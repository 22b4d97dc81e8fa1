"""The rows that checks use, and how well rows can come back at best.

All are float64 ``[n_groups, group_size]`` on the CPU and the same at every call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian(n_groups: int, group_size: int, seed: int = 0) -> Tensor:
    """Return unit normal numbers."""
    return torch.randn(n_groups, group_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(n_groups: int, group_size: int, seed: int = 0) -> Tensor:
    """Return normal rows of magnitudes from 1/50 to 50, as the channels of keys have: a scale of another row shows."""
    magnitudes: Tensor = 50.0 ** (
        torch.rand(n_groups, 1, generator=torch.Generator().manual_seed(seed + 1)).double() * 2 - 1
    )
    return gaussian(n_groups, group_size, seed) * magnitudes


def shifted(n_groups: int, group_size: int) -> Tensor:
    """Return rows like `spread` that lie to one side of zero, as channels of keys with a large mean do."""
    rows = spread(n_groups, group_size, seed=3)
    return rows + 4 * rows.square().mean(dim=1, keepdim=True).sqrt()


def one_outlier(n_groups: int, group_size: int) -> Tensor:
    """Return normal rows with one number in each a hundred times larger, at a place of its own, of either sign."""
    rows = gaussian(n_groups, group_size)
    index = torch.arange(n_groups)
    rows[index, index * 5 % group_size] = 100.0 * (1 - 2 * (index % 2)).double()
    return rows


def constants() -> Tensor:
    """Return the values ``[n, 1]`` of constant rows: of either sign, small and large, representable in any type."""
    return torch.tensor([[1.0], [-1.0], [0.5], [-3.0], [100.0], [-1.0 / 1024], [2.0**-10], [4096.0]]).double()


def step(rows: Tensor, nbits: int) -> Tensor:
    """Return one step of the even grid of ``2**nbits`` levels from -max(abs(row)) to max(abs(row)), ``[n_groups]``."""
    reach: Tensor = rows.abs().amax(dim=1)
    return 2 * reach / float(2**nbits - 1)


def rms(error: Tensor) -> Tensor:
    """Return the root of each row's mean square, ``[n_groups]``."""
    return error.square().mean(dim=1).sqrt()


def even_grid_error(rows: Tensor, nbits: int) -> Tensor:
    """Return the root mean square error of rounding each row to an even grid, in theory, ``[n_groups]``.

    The error of rounding to a grid of step d is uniform on (-d/2, d/2), whose root mean square is ``d / sqrt(12)``
    (Bennett 1948, "Spectra of Quantized Signals").
    """
    return step(rows, nbits) / math.sqrt(12)


def error_ratio(rows: Tensor, read: Tensor, due: Tensor) -> float:
    """Return the error beside the one that is due: 1 for as good as that, 2 for a bit less than promised.

    Args:
        rows: ``[n_groups, group_size]``; no row all zero.
        read: what came back, of the same shape.
        due: root mean square error of each row in theory, ``[n_groups]``.
    """
    return float((rms(read - rows) / due).square().mean().sqrt())


def nearest_in_table(rows: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """Return the entry of ``table * scale`` that is nearest to each number.

    Args:
        rows: ``[n_groups, group_size]``.
        table: ``[entries]``, in any order.
        scale: ``[n_groups]``.
    """
    entries = table.unique()  # sorted
    between = (entries[1:] + entries[:-1]) / 2
    unit = rows / scale.where(scale != 0, 1)[:, None]
    nearest: Tensor = entries[torch.bucketize(unit, between)] * scale[:, None]
    return nearest


def best_scale_error(rows: Tensor, table: Tensor) -> Tensor:
    """Return each row's root mean square error under the best scale for this table, by search, ``[n_groups]``."""
    full = rows.abs().amax(dim=1) / table.abs().max()
    candidates = [full * 2.0 ** (exponent / 8) for exponent in range(-24, 9)]
    errors = [rms(nearest_in_table(rows, table, scale) - rows) for scale in candidates]
    return torch.stack(errors).amin(dim=0)

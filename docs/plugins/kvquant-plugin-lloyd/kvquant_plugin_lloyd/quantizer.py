"""Lloyd-Max quantisation of each row, in codebook format: ``table[codes] * scale``.

The table holds the optimal levels for normal numbers (see `levels`), divided by the largest of them, so that `scale` is
a number of the row's own size. Numbers become the nearest level. The textbook's scale is the row's root mean square::

    scale = sqrt(mean(x**2)) * largest level

Rows are short and not quite normal, so two scales are tried: this one, which cuts off what is far out, and the row's
largest magnitude, which cuts off nothing. Each is then moved to where the squared error is smallest for the levels it
chose, ``sum(x * level) / sum(level**2)`` (least squares), and the one that leaves the smaller error is taken.
"""

import torch
from kvquant.plugin import QuantizedRows, Scheme
from torch import Tensor

from kvquant_plugin_lloyd.levels import normal_levels


class LloydQuantizer:
    """Quantises each row on its own, and keeps nothing between calls."""

    def __init__(self, scheme: Scheme) -> None:
        """Read the scheme, and refuse what cannot work.

        Args:
            scheme: 1 to 4 bits, axis, group size and the option ``scale``.

        Raises:
            ValueError: ``scale`` is neither "fit" nor "rms".
        """
        scale = scheme.options.get("scale", "fit")
        if scale not in ("fit", "rms"):
            raise ValueError(f"scale={scale!r} cannot work: expected 'fit' or 'rms'")
        self.fit = scale == "fit"
        levels = normal_levels(scheme.nbits)
        self.largest_level = levels[-1]
        self.levels = [level / self.largest_level for level in levels]

    def quantize(self, rows: Tensor) -> QuantizedRows:
        """Quantise each row; a row of zeros gets scale 0.

        Args:
            rows: floating ``[n_groups, group_size]``, finite; not modified.

        Returns:
            codes uint8 ``[n_groups, group_size]``; scale float32 ``[n_groups]``; table float32 ``[2**nbits]``.
        """
        numbers = rows.float()
        table = torch.tensor(self.levels, device=rows.device)
        # Relative to the largest magnitude of the row, so that no square overflows or vanishes.
        size = numbers.abs().amax(dim=1, keepdim=True)
        unit = numbers / torch.where(size > 0, size, 1)
        scale = unit.square().mean(dim=1, keepdim=True, dtype=torch.float64).sqrt().float() * self.largest_level
        if self.fit:
            scale = _fitted(unit, table, [scale, torch.ones_like(scale)])
        # Beyond the range of float32 only for rows that reach its end.
        scale = torch.minimum(scale, torch.finfo(torch.float32).max * (1 - 1e-6) / size)
        codes = _nearest(unit, table, scale)
        return QuantizedRows(codes.to(torch.uint8), (scale * size).squeeze(1), table=table)


def _fitted(unit: Tensor, table: Tensor, starts: list[Tensor]) -> Tensor:
    """Return the scale of least squares for the levels that each of `starts` chooses, the best of them for each row.

    Sums are in float64, so that a row's result does not depend on where in the call the row stands.

    Args:
        unit: float32 ``[n_groups, group_size]``.
        table: float32 ``[2**nbits]``, without zero.
        starts: scales, float32 ``[n_groups, 1]`` each.

    Returns:
        float32 ``[n_groups, 1]``.
    """
    best = torch.zeros_like(starts[0])
    explained = torch.full_like(best, -1, dtype=torch.float64)
    for start in starts:
        levels = table[_nearest(unit, table, start)]
        product = (unit * levels).sum(dim=1, keepdim=True, dtype=torch.float64)
        scale = product / levels.square().sum(dim=1, keepdim=True, dtype=torch.float64)
        better = product * scale > explained  # of the row's sum of squares; what remains is the error
        best, explained = scale.float().where(better, best), (product * scale).where(better, explained)
    return best


def _nearest(unit: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """Return the indices of the nearest levels, int64 ``[n_groups, group_size]``: the midpoints below each number."""
    return torch.bucketize(unit / torch.where(scale > 0, scale, 1), (table[1:] + table[:-1]) / 2)

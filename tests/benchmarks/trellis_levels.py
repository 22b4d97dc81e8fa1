"""Find the levels of the trellis backend for normal numbers: ``python -m tests.benchmarks.trellis_levels``.

A generalised Lloyd iteration: paths are searched with the levels that there are, and every level becomes the mean of
the numbers that took it, those below zero mirroring those above. What is printed is the table in the backend.
"""

from __future__ import annotations

import torch

from kvquant_plugins import trellis

#: Rows of 64 normal numbers; half of the digits that are printed would be noise with fewer.
_ROWS, _GROUP, _ROUNDS = 16384, 64, 25


def find_levels(nbits: int, states: int) -> tuple[tuple[float, ...], float]:
    """Return the levels above zero, and the share of the variance that they leave."""
    rows = torch.randn(_ROWS, _GROUP, generator=torch.Generator().manual_seed(0))
    count = 2 ** (nbits + 1)
    table = torch.special.ndtri((torch.arange(count) + 0.5) / count)
    error = 1.0
    for _ in range(_ROUNDS):
        indices = torch.cat([trellis.search(part, table, trellis.TAPS[states])[1] for part in rows.split(1024)]).long()
        error = float((table[indices] - rows).square().mean())
        sums = torch.zeros(count).index_add_(0, indices.flatten(), rows.flatten())
        means = sums / torch.bincount(indices.flatten(), minlength=count)
        table = (means - means.flip(0)) / 2
    return tuple(round(level, 4) for level in table[count // 2 :].tolist()), error


if __name__ == "__main__":
    torch.set_num_threads(1)
    for nbits in (1, 2, 3):
        for states in trellis.TAPS:
            above, left = find_levels(nbits, states)
            print(f"    ({nbits}, {states}): {above},  # leaves {left:.4f}", flush=True)

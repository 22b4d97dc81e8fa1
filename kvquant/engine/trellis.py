"""Trellis codes: a number's level depends on its own code and on the last bits of the codes before it in its row.

Every code has one bit that goes into a shift register, the lowest one. Two sums (modulo 2) over the register choose one
of four sets of levels, and the other bits of the code choose a level of the set. So a row can use twice as many levels
as its codes could tell apart, and a search finds the path through them that fits it best (Marcellin and Fischer 1990,
"Trellis coded quantization of memoryless and Gauss-Markov sources", https://doi.org/10.1109/26.46532; the codes are
Ungerboeck's, 1982, https://doi.org/10.1109/TIT.1982.1056454). Reading is a few shifts and sums of whole rows of bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Bits of the register that a code may look back at; more would be searched for too long.
MOST_MEMORY = 8


class Taps(NamedTuple):
    """Which bits of the register are summed, bit d for the one of d numbers ago.

    Attributes:
        high, low: for the high and the low bit of the number of the set.
    """

    high: int
    low: int


def level_indices(codes: Tensor, taps: Taps, dim: int) -> Tensor:
    """Return which entry of the table each code stands for.

    Args:
        codes: uint8, rows along dimension `dim`, which begin with a register of zeros.
        taps: of the trellis.
        dim: a dimension.

    Returns:
        uint8 like `codes`: ``4 * (code >> 1) + 2 * high + low``.
    """
    rows = codes.movedim(dim, -1)
    register, indices = rows & 1, rows >> 1 << 2
    for back in range(min(max(taps).bit_length(), rows.shape[-1])):
        past = torch.nn.functional.pad(register[..., : register.shape[-1] - back], (back, 0))
        indices = indices ^ (past * (2 * (taps.high >> back & 1) + (taps.low >> back & 1)))
    return indices.movedim(-1, dim)

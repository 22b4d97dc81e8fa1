"""Where the codes of a packed row lie, cut into the vectors that the processor has.

A row of packed codes is a few runs of contiguous ones (see `kvquant.engine.packing`), which compilers do not see. Here
they are listed; `simd` makes instructions of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llvmlite import binding
from numba.core import config

from kvquant.engine.packing import packed_bytes

_FEATURES = config.CPU_FEATURES or binding.get_host_cpu_features().flatten()
#: Whether numba compiles for registers of 512 bits.
_WIDE = "+avx512f" in _FEATURES
#: Whether registers of 256 bits can be looked up in.
PERMUTES = "+avx2" in _FEATURES
#: Numbers in a vector, and tokens whose products are summed side by side: as many as the registers hold.
LANES, UNROLL = (16, 4) if _WIDE else (8, 2)


@dataclass(frozen=True)
class Field:
    """Where some bits of a run of codes are.

    Attributes:
        byte: the first of as many bytes as there are codes.
        shift: by which each byte is shifted right; then `mask` is applied.
        raised: by which what is left is shifted left.
    """

    byte: int
    shift: int
    mask: int
    raised: int = 0


@dataclass(frozen=True)
class Bits:
    """Where the highest bits of a run of codes are, in order.

    Attributes:
        bit: the first of as many bits as there are codes, counted from the low bit of the row's first byte.
        raised: by which a bit is shifted left.
    """

    bit: int
    raised: int


@dataclass(frozen=True)
class Run:
    """Contiguous codes that one vector takes: `length` from code `start`, put together from `fields` and `highest`.

    Attributes:
        table: the first entry of the table that its codes name: the second half of a row may have one of its own.
    """

    start: int
    length: int
    fields: tuple[Field, ...]
    highest: Bits | None = None
    table: int = 0

    @property
    def mask(self) -> int:
        """The largest code."""
        found = 0 if self.highest is None else 1 << self.highest.raised
        for field in self.fields:
            found |= field.mask << field.raised
        return found


#: Entries of a table for one half of a row, repeated where it has fewer: a register of numbers.
HALF_TABLE = 16


def runs(width: int, nbits: float, group: int) -> list[Run]:
    """Return the runs of a packed row, none across the border of a group, those of the same bytes together.

    Args:
        width: codes in the row; the layout is that of `kvquant.engine.packing`.
        nbits: bits of a code.
        group: codes of a group; `width` where a row lies in one group.
    """
    lower, half = int(nbits), width // 2
    if nbits == lower:
        return _plain_runs(width, lower, group)
    first_bit = 8 * packed_bytes(width, lower)
    return [
        replace(run, highest=Bits(first_bit + run.start, lower)) if run.start < half else replace(run, table=HALF_TABLE)
        for run in _plain_runs(width, lower, math.gcd(group, half))
    ]


def _plain_runs(width: int, nbits: int, group: int) -> list[Run]:
    """Return the runs of a row of one width."""
    padded = -(-width // 8) * 8
    plane_bits = 1 if nbits == 3 else nbits
    plane = padded * plane_bits // 8  # codes of a plane, one a byte
    found = []
    for offset, length in _pieces(0, plane):
        for index in range(8 // plane_bits):
            for start, part in _pieces(index * plane + offset, index * plane + offset + length, group, width):
                found.append(Run(start, part, _fields(start, index, plane, nbits)))
    return found


def _fields(start: int, plane_index: int, plane: int, nbits: int) -> tuple[Field, ...]:
    if nbits != 3:
        return (Field(start - plane_index * plane, plane_index * nbits, 2**nbits - 1),)
    low_plane = 2 * plane  # codes of a plane of the low two bits; the plane of the high bit comes behind them
    low = Field(start % low_plane, 2 * (start // low_plane), 3)
    return low, Field(low_plane + start - plane_index * plane, plane_index, 1, raised=2)


def _pieces(start: int, stop: int, group: int | None = None, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut a range into vectors, at the borders of groups and at `end`."""
    stop = stop if end is None else min(stop, end)
    while start < stop:
        room = stop - start if group is None else min(stop - start, group - start % group)
        length = min(LANES, 1 << (room.bit_length() - 1))
        yield start, length
        start += length

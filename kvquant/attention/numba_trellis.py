"""Codes of a trellis, read by the kernel: rows of packed codes become rows of packed indices into the table.

What goes into the register is one bit of each code, and the bits of a packed row lie side by side. So whole bytes of
them are shifted and summed: some twenty instructions for a token's head, whatever the number of query rows.
"""

from __future__ import annotations

from typing import Any

from numba import carray, njit

from kvquant.attention.numba_blocks import ROW
from kvquant.attention.simd import pointer_to
from kvquant.engine.trellis import MOST_MEMORY


@njit(nogil=True, inline="always")
def expand(
    page: Any,
    codes: Any,
    position: Any,
    count: Any,
    work: Any,
    shape: Any,
    bits: Any,
    per: Any,
    channel: Any,
    high: Any,
    low: Any,
) -> None:
    """Write what the codes of `count` tokens stand for to `work.expanded`, for `simd.runs` to read.

    Args:
        page, position, count, work, shape, bits, per: as for the other functions of a block.
        codes: address of the first token's packed codes.
        channel: whether rows go along the tokens; else along the channels.
        high, low: taps of the trellis.
    """
    planes = min(bits, 2)
    plane = (shape + 7) // 8 * planes  # bytes
    length = plane + plane // 2 if bits == 3 else plane
    for t in range(count):
        row = carray(pointer_to(codes + t * page[ROW], 0), (length,))
        out = work.expanded[t]
        for j in range(plane):
            out[j] = 0
            out[plane + j] = 0 if bits == 1 else row[j] >> 1 & 85
        if bits == 3:
            for j in range(plane // 2):
                out[2 * plane + j] = row[plane + j]
        for back in range(MOST_MEMORY + 1):
            if (high | low) >> back & 1 and (not channel or (position + t) % per >= back):
                if channel:
                    before = carray(pointer_to(codes + (t - back) * page[ROW], 0), (length,))
                    for j in range(plane):
                        work.past[j] = before[j]
                else:
                    look_back(row, work.past, plane, planes, back)
                    if per < shape:
                        forget(work.past, plane, planes, per, back)
                add(out, work.past, plane, planes, high >> back & 1, low >> back & 1)


@njit(nogil=True, inline="always")
def look_back(row: Any, past: Any, plane: Any, planes: Any, back: Any) -> None:
    """Write the codes of `back` channels before to `past`, zeros before the first."""
    for j in range(back, plane):
        past[j] = row[j - back]
    # The channel before the first of a plane is the last of the plane below, whose bits are further right.
    for j in range(min(back, plane)):
        wraps = (back - j + plane - 1) // plane
        past[j] = (row[j - back + wraps * plane] & (255 if planes == 1 else 85)) << wraps * planes


@njit(nogil=True, inline="always")
def forget(past: Any, plane: Any, planes: Any, per: Any, back: Any) -> None:
    """Take out the first `back` channels of each group, where the codes before are those of the group before."""
    for index in range(8 // planes):
        inside = index * plane % per  # where in its group the plane begins
        for start in range(-inside % per, plane, per):
            for j in range(start, min(start + back, plane)):
                past[j] &= ~(1 << index * planes)
        if inside:
            for j in range(min(max(back - inside, 0), plane)):
                past[j] &= ~(1 << index * planes)


@njit(nogil=True, inline="always")
def add(out: Any, past: Any, plane: Any, planes: Any, high: Any, low: Any) -> None:
    """Add (modulo 2) what was `back` numbers ago to the number of the set, to its high bit, its low bit or both."""
    for j in range(plane):
        if planes == 1:
            out[j] ^= past[j] if low else 0
            out[plane + j] ^= past[j] if high else 0
        else:
            bit = past[j] & 85
            out[j] ^= (bit if low else 0) | (bit << 1 if high else 0)

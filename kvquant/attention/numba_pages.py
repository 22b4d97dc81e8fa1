"""What a page is to the kernel on the CPU, and how the kernel reads its scales and offsets, however they are stored.

A page is a row of integers, see `PAGE`. The functions are inlined into the kernel by numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from kvquant.attention.simd import byte_to_scale, half_to_float, pointer_to
from kvquant.engine.scales import CENTER, PARTS, TABLE_SPAN

#: What a page is to the kernel: addresses, strides (bytes of codes, numbers of scales), the page's token that comes
#: first, how scales are stored, its outlier tokens (address and strides of their positions, how many there are in
#: a block, and the tokens of a block), and which tokens of the body are read from it.
PAGE = (
    "codes batch head row scale scale_batch scale_head offset table first stored outlier outlier_batch outlier_head "
    "kept block start stop"
).split()
(
    CODES, BATCH, HEAD, ROW, SCALE, SCALE_BATCH, SCALE_HEAD, OFFSET, TABLE, FIRST, STORED, OUTLIER, OUTLIER_BATCH,
    OUTLIER_HEAD, KEPT, BLOCK, START, STOP,
) = range(len(PAGE))  # fmt: skip
#: How scales may be stored.
FLOATS, HALVES, BYTES = range(3)


@njit(nogil=True, inline="always")
def fetch(address: Any, count: Any, stored: Any, out: Any) -> None:
    """Read `count` scales, `stored` as `FLOATS`, `HALVES` or `BYTES`."""
    if stored == HALVES:
        halves = carray(pointer_to(address, 2), (count,))
        for index in range(count):
            out[index] = half_to_float(halves[index])
    elif stored == BYTES:
        octets = carray(pointer_to(address, 0), (count,))
        for index in range(count):
            out[index] = byte_to_scale(octets[index])
    else:
        floats = carray(pointer_to(address, 1), (count,))
        for index in range(count):
            out[index] = floats[index]


@njit(nogil=True, fastmath=True, inline="always")
def fetch_offsets(address: Any, count: Any, stored: Any, scales: Any, half_bits: Any, entries: Any, out: Any) -> None:
    """Read `count` offsets whose scales have been read; in bytes they are relative to those (see `engine.scales`)."""
    if stored == BYTES:
        levels = 2.0 ** ((half_bits + 1) // 2)
        span = np.float32(TABLE_SPAN if entries else levels)
        middle = np.float32(0.0 if entries else (levels - 1) / 2)
        octets = carray(pointer_to(address, 0), (count,))
        part = span / np.float32(PARTS)
        for index in range(count):
            out[index] = ((np.float32(octets[index]) - np.float32(CENTER)) * part - middle) * scales[index]
    else:
        fetch(address, count, stored, out)


@njit(nogil=True, inline="always")
def scales_at(page: Any, field: Any, batch: Any, head: Any, row: Any, width: Any) -> Any:
    """Return the address of a row of scales (or offsets) of `width` numbers."""
    stored = page[STORED]
    size = 4 if stored == FLOATS else 2 if stored == HALVES else 1
    return page[field] + size * (batch * page[SCALE_BATCH] + head * page[SCALE_HEAD] + row * width)


@njit(nogil=True, inline="always")
def fetch_by_group(page: Any, address: Any, count: Any, groups: Any, work: Any) -> None:
    """Read the scales of `count` tokens, `groups` each, to ``scales[token * groups + group]`` and ``by_group``."""
    fetch(address, count * groups, page[STORED], work.scales)
    for group in range(groups):
        for token in range(count):
            work.by_group[group, token] = work.scales[token * groups + group]


@njit(nogil=True, inline="always")
def fetch_offsets_by_group(
    page: Any, address: Any, count: Any, groups: Any, half_bits: Any, entries: Any, work: Any
) -> None:
    """Read the offsets of `count` tokens whose scales `fetch_by_group` has read, to ``offsets_by_group``."""
    fetch_offsets(address, count * groups, page[STORED], work.scales, half_bits, entries, work.offsets)
    for group in range(groups):
        for token in range(count):
            work.offsets_by_group[group, token] = work.offsets[token * groups + group]


@njit(nogil=True, inline="always")
def codes_of(page: Any, batch: Any, head: Any, position: Any) -> Any:
    """Return the address of the packed codes of a token."""
    return page[CODES] + batch * page[BATCH] + head * page[HEAD] + position * page[ROW]

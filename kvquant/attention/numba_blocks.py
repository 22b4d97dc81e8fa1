"""What the kernel does with one block of tokens: score, weigh, mix. Inlined into the kernel by numba.

Every function takes a `Work`, the kernel's own memory, a page as a row of integers (see `numba_pages`), and literal
numbers that shape its loops. Packed rows of the block begin at the address `codes` and are `apart` bytes apart. In the
formulas q is the query, c a code, s and o the scale and offset of its group, w a weight.
"""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

import numpy as np
from numba import carray, njit

from kvquant.attention.numba_pages import (
    BLOCK,
    KEPT,
    OFFSET,
    OUTLIER,
    OUTLIER_BATCH,
    OUTLIER_HEAD,
    SCALE,
    STORED,
    TABLE,
    fetch,
    fetch_by_group,
    fetch_offsets,
    fetch_offsets_by_group,
    scales_at,
)
from kvquant.attention.simd import dot_rows, mix_rows, pointer_to

#: What a mask is to the kernel: addresses (0: there is none) and strides of an additive mask and of one of bytes, and
#: the query tokens of a group.
MASK = "bias b_batch b_head b_group b_query b_token seen s_batch s_head s_group s_query s_token queries".split()

#: A score so low that it cannot be told from minus infinity, which would forbid fast arithmetic.
LOWEST = np.float32(np.finfo(np.float32).min)

_LOG2_E = np.float32(math.log2(math.e))
_SERIES = tuple(np.float32(math.log(2) ** n / math.factorial(n)) for n in range(8))

#: The kernel's memory, all float32 but `bits`; `rows` query rows are worked on at once, and a block of tokens, which
#: has `room` for a few more.
#:
#: - folded ``[rows, width]``, shifts ``[rows]``: queries times scales, and queries times offsets
#: - query_sums ``[rows, groups]``: sums of each query's numbers
#: - products ``[groups, rows, room]``, scores ``[rows, room]``, weights ``[groups, rows, room]``
#: - scales, offsets: of a group's channels, or of a block's tokens; by_group, offsets_by_group ``[groups, room]``
#: - bits, powers ``[room]``: the same memory as int32 and as float32
#: - mix, sums ``[rows, width]``, offset_sums ``[rows, groups]``; highest, total ``[rows]``
#: - expanded ``[block, bytes]``: rows of indices, where codes are those of a trellis
Work = namedtuple(
    "Work",
    "folded shifts query_sums products scores weights scales offsets by_group offsets_by_group bits powers mix sums "
    "offset_sums highest total expanded",
)


@njit(nogil=True, fastmath=True, inline="always")
def score_by_channel(
    work: Any,
    page: Any,
    own: Any,
    batch: Any,
    head: Any,
    position: Any,
    count: Any,
    codes: Any,
    apart: Any,
    shape: Any,
    half_bits: Any,
    per: Any,
    rows: Any,
    entries: Any,
    shifted: Any,
    room: Any,
) -> None:
    """Score tokens whose scales they share: ``q . (c * s + o) = (q * s) . c + q . o``."""
    done = 0
    while done < count:
        group = (position + done) // per
        stop = min(count, (group + 1) * per - position)
        fetch(scales_at(page, SCALE, batch, head, group, shape), shape, page[STORED], work.scales)
        for r in range(rows):
            work.shifts[r] = 0
            for d in range(shape):
                work.folded[r, d] = own[r, d] * work.scales[d]
        if shifted:
            address = scales_at(page, OFFSET, batch, head, group, shape)
            fetch_offsets(address, shape, page[STORED], work.scales, half_bits, entries, work.offsets)
            for r in range(rows):
                shift = np.float32(0)
                for d in range(shape):
                    shift += own[r, d] * work.offsets[d]
                work.shifts[r] = shift
        dot_rows(
            pointer_to(codes + done * apart, 0),
            apart,
            stop - done,
            pointer_to(work.folded.ctypes.data, 1),
            pointer_to(page[TABLE], 1),
            pointer_to(work.products.ctypes.data, 1),
            shape,
            half_bits,
            shape,
            rows,
            entries,
            room,
        )
        for r in range(rows):
            target, product = work.scores[r, done:stop], work.products[0, r]
            for t in range(stop - done):
                target[t] = product[t] + work.shifts[r]
        done = stop


@njit(nogil=True, fastmath=True, inline="always")
def score_by_token(
    work: Any,
    page: Any,
    own: Any,
    batch: Any,
    head: Any,
    position: Any,
    count: Any,
    codes: Any,
    apart: Any,
    shape: Any,
    half_bits: Any,
    per: Any,
    rows: Any,
    entries: Any,
    shifted: Any,
    room: Any,
) -> None:
    """Score tokens that have their own scales: the sum over groups of ``s * (q . c) + o * sum(q)``."""
    groups = shape // per
    dot_rows(
        pointer_to(codes, 0),
        apart,
        count,
        pointer_to(own.ctypes.data, 1),
        pointer_to(page[TABLE], 1),
        pointer_to(work.products.ctypes.data, 1),
        shape,
        half_bits,
        per,
        rows,
        entries,
        room,
    )
    address = scales_at(page, SCALE, batch, head, position, groups)
    fetch_by_group(page, address, count, groups, work)
    if shifted:
        address = scales_at(page, OFFSET, batch, head, position, groups)
        fetch_offsets_by_group(page, address, count, groups, half_bits, entries, work)
    for r in range(rows):
        for t in range(count):
            work.scores[r, t] = 0
        for g in range(groups):
            for t in range(count):
                work.scores[r, t] += work.products[g, r, t] * work.by_group[g, t]
            if shifted:
                for t in range(count):
                    work.scores[r, t] += work.query_sums[r, g] * work.offsets_by_group[g, t]


@njit(nogil=True, inline="always")
def add_mask(scores: Any, mask: Any, batch: Any, head: Any, row: Any, start: Any, count: Any) -> None:
    """Add the additive mask of tokens `start` to `start + count`."""
    at = batch * mask[1] + head * mask[2] + row // mask[12] * mask[3] + row % mask[12] * mask[4] + start * mask[5]
    numbers = carray(pointer_to(mask[0] + 4 * at, 1), (1 + count * mask[5],))
    for t in range(count):
        scores[t] = max(scores[t] + numbers[t * mask[5]], LOWEST)


@njit(nogil=True, inline="always")
def hide(scores: Any, mask: Any, batch: Any, head: Any, row: Any, start: Any, count: Any, hidden: Any) -> None:
    """Put `hidden` in place of what belongs to tokens that may not be seen."""
    at = batch * mask[7] + head * mask[8] + row // mask[12] * mask[9] + row % mask[12] * mask[10] + start * mask[11]
    seen = carray(pointer_to(mask[6] + at, 0), (1 + count * mask[11],))
    for t in range(count):
        if seen[t * mask[11]] == 0:
            scores[t] = hidden


@njit(nogil=True, fastmath=True, inline="always")
def exponentials(x: Any, count: Any, bits: Any, powers: Any) -> None:
    """Replace the first `count` numbers of `x`, none above zero, by their exponentials.

    ``e**x = 2**k * 2**f`` with k the integer nearest to ``x * log2(e)`` and f from -1/2 to 1/2, where the first eight
    terms of the series of ``2**f`` are exact to 5e-9.
    """
    for index in range(count):
        power = max(x[index] * _LOG2_E, np.float32(-126.0))
        whole = np.floor(power + np.float32(0.5))
        part = power - whole
        value = _SERIES[7]
        value = value * part + _SERIES[6]
        value = value * part + _SERIES[5]
        value = value * part + _SERIES[4]
        value = value * part + _SERIES[3]
        value = value * part + _SERIES[2]
        value = value * part + _SERIES[1]
        x[index] = value * part + _SERIES[0]
        bits[index] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    for index in range(count):
        x[index] *= powers[index]


@njit(nogil=True, fastmath=True, inline="always")
def soften(scores: Any, count: Any, cap: Any, falling: Any, bits: Any, powers: Any) -> None:
    """Replace scores x by ``cap * tanh(x / cap)``; with ``e = exp(-2 |x| / cap)`` it is ``cap * (1 - e) / (1 + e)``.

    Near zero ``1 - e`` is exact to the rounding of 1, which is that of a score of the size of `cap`.
    """
    twice = np.float32(-2) / cap
    for t in range(count):
        falling[t] = max(abs(scores[t]) * twice, LOWEST)
    exponentials(falling, count, bits, powers)
    for t in range(count):
        size = cap * (np.float32(1) - falling[t]) / (np.float32(1) + falling[t])
        scores[t] = size if scores[t] > 0 else -size


@njit(nogil=True, inline="always")
def leave_out(scores: Any, page: Any, batch: Any, head: Any, position: Any, count: Any, value: Any) -> None:
    """Set the scores of a page's outlier tokens, among `count` tokens from its token `position` on."""
    kept, size = page[KEPT], page[BLOCK]
    if kept != 0:
        first = batch * page[OUTLIER_BATCH] + head * page[OUTLIER_HEAD]
        for block in range(position // size, (position + count - 1) // size + 1):
            places = carray(pointer_to(page[OUTLIER] + 4 * (first + block * kept), 4), (kept,))
            for index in range(kept):
                token = block * size + places[index] - position
                if 0 <= token < count:
                    scores[token] = value


@njit(nogil=True, fastmath=True, inline="always")
def weigh(
    work: Any,
    mask: Any,
    cap: Any,
    batch: Any,
    head: Any,
    first_row: Any,
    start: Any,
    count: Any,
    shape: Any,
    groups: Any,
    rows: Any,
    keys: Any,
    k_at: Any,
    values: Any,
    v_at: Any,
) -> None:
    """Turn scores into weights relative to the highest score so far, and what was summed before with them.

    Scores are soft-capped first unless `cap` is 0, then masked; outlier tokens of `keys` and `values` are left out.
    """
    for r in range(rows):
        scores = work.scores[r]
        if cap != 0:
            soften(scores, count, cap, work.products[0, r], work.bits, work.powers)
        if mask[0] != 0:
            add_mask(scores, mask, batch, head, first_row + r, start, count)
        if mask[6] != 0:
            hide(scores, mask, batch, head, first_row + r, start, count, LOWEST)
        leave_out(scores, keys, batch, head, k_at, count, LOWEST)
        leave_out(scores, values, batch, head, v_at, count, LOWEST)
        top = work.highest[r]
        for t in range(count):
            top = max(top, scores[t])
        for t in range(count):
            scores[t] = max(scores[t] - top, LOWEST)
        exponentials(scores, count, work.bits, work.powers)
        if mask[6] != 0:
            hide(scores, mask, batch, head, first_row + r, start, count, np.float32(0))
        leave_out(scores, keys, batch, head, k_at, count, np.float32(0))
        leave_out(scores, values, batch, head, v_at, count, np.float32(0))
        kept = np.exp(max(work.highest[r] - top, np.float32(-200.0)))
        added = np.float32(0)
        for t in range(count):
            added += scores[t]
        work.total[r] = work.total[r] * kept + added
        work.highest[r] = top
        if kept != 1:
            for d in range(shape):
                work.sums[r, d] *= kept
            for g in range(groups):
                work.offset_sums[r, g] *= kept


@njit(nogil=True, fastmath=True, inline="always")
def mix_by_channel(
    work: Any,
    page: Any,
    batch: Any,
    head: Any,
    position: Any,
    count: Any,
    codes: Any,
    apart: Any,
    shape: Any,
    half_bits: Any,
    per: Any,
    rows: Any,
    entries: Any,
    shifted: Any,
    room: Any,
) -> None:
    """Mix tokens whose scales they share: ``sum(w * (c * s + o)) = s * sum(w * c) + o * sum(w)``."""
    done = 0
    while done < count:
        group = (position + done) // per
        stop = min(count, (group + 1) * per - position)
        mix_rows(
            pointer_to(codes + done * apart, 0),
            apart,
            stop - done,
            pointer_to(work.scores.ctypes.data + 4 * done, 1),
            pointer_to(page[TABLE], 1),
            pointer_to(work.mix.ctypes.data, 1),
            shape,
            half_bits,
            shape,
            rows,
            entries,
            room,
        )
        fetch(scales_at(page, SCALE, batch, head, group, shape), shape, page[STORED], work.scales)
        for r in range(rows):
            for d in range(shape):
                work.sums[r, d] += work.mix[r, d] * work.scales[d]
        if shifted:
            address = scales_at(page, OFFSET, batch, head, group, shape)
            fetch_offsets(address, shape, page[STORED], work.scales, half_bits, entries, work.offsets)
            for r in range(rows):
                weight = np.float32(0)
                weights = work.scores[r, done:stop]
                for t in range(stop - done):
                    weight += weights[t]
                for d in range(shape):
                    work.sums[r, d] += weight * work.offsets[d]
        done = stop


@njit(nogil=True, fastmath=True, inline="always")
def mix_by_token(
    work: Any,
    page: Any,
    batch: Any,
    head: Any,
    position: Any,
    count: Any,
    codes: Any,
    apart: Any,
    shape: Any,
    half_bits: Any,
    per: Any,
    rows: Any,
    entries: Any,
    shifted: Any,
    room: Any,
) -> None:
    """Mix tokens that have their own scales: ``sum(w * (c * s + o)) = sum((w * s) * c) + sum(w * o)``."""
    groups = shape // per
    address = scales_at(page, SCALE, batch, head, position, groups)
    fetch_by_group(page, address, count, groups, work)
    for g in range(groups):
        for r in range(rows):
            for t in range(count):
                work.weights[g, r, t] = work.scores[r, t] * work.by_group[g, t]
    if shifted:
        address = scales_at(page, OFFSET, batch, head, position, groups)
        fetch_offsets_by_group(page, address, count, groups, half_bits, entries, work)
        for g in range(groups):
            for r in range(rows):
                shift = np.float32(0)
                for t in range(count):
                    shift += work.scores[r, t] * work.offsets_by_group[g, t]
                work.offset_sums[r, g] += shift
    mix_rows(
        pointer_to(codes, 0),
        apart,
        count,
        pointer_to(work.weights.ctypes.data, 1),
        pointer_to(page[TABLE], 1),
        pointer_to(work.mix.ctypes.data, 1),
        shape,
        half_bits,
        per,
        rows,
        entries,
        room,
    )
    for r in range(rows):
        for d in range(shape):
            work.sums[r, d] += work.mix[r, d]

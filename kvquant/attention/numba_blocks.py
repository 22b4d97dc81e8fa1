"""What the kernel does with one block of tokens: score, weigh, mix. Inlined into the kernel by numba.

Every function takes a `Work`, the kernel's own memory, a page as a row of integers (see `numba_pages`), and literal
numbers that shape its loops. Packed rows of the block begin at the address `codes` and are `apart` bytes apart. In the
formulas q is the query, c a code, s and o the scale and offset of its group, w a weight.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
from numba import njit

from kvquant.attention.numba_pages import (
    OFFSET,
    SCALE,
    STORED,
    TABLE,
    fetch,
    fetch_by_group,
    fetch_offsets,
    fetch_offsets_by_group,
    scales_at,
)
from kvquant.attention.numba_scores import LOWEST, add_mask, exponentials, hide, leave_out, soften
from kvquant.attention.simd import dot_rows, mix_rows, pointer_to

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


@njit(nogil=True, fastmath=True, inline="always")
def weigh(
    work: Any,
    mask: Any,
    cap: Any,
    shift: Any,
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

    Unless `cap` is 0, each query row's `shift` is added to its scores and they are soft-capped; then they are masked.
    Outlier tokens of `keys` and `values` are left out.
    """
    for r in range(rows):
        scores = work.scores[r]
        if cap != 0:
            soften(scores, count, shift[r], cap, work.products[0, r], work.bits, work.powers)
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

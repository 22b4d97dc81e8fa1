"""What runs on the device: attention over one stretch of packed tokens, and the merge of such attentions.

Imports triton, so it is imported by `triton_kernels` alone and inside its functions. The tokens are split over programs
and the splits are merged by their log-sum-exp (Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html).

How numbers are multiplied. A tensor core takes 16-bit operands at twice the rate of 32-bit ones, and half the shared
memory. Codes are small integers, so they fit 16 bits exactly; scales do not need to be on their side of the product. So
scales are folded into the other operand (query or softmax weight), which is cut into three bfloat16 terms that hold
its 24 bits; products of bfloat16 are exact in the float32 that they are summed in. What is multiplied is exact, what is
summed is rounded as in float32. Where scales cannot be folded, or entries of a codebook need 24 bits, both operands
are float32 and tf32x3 does the same at more than twice the cost.

How the rows of a product are used. A product has 16 rows at least, one query token of a group of 4 heads has 4. Query
rows are therefore repeated ``EXPAND`` times, the rows of a repetition adjacent. A repetition is for one scale group and
one term, *(group, term)* in this order, and zero outside of its group of channels: one product gives the sums of all
groups apart. On the side of the values they are picked at the very end. With 4 query rows and 2 groups, 32 rows take
one pass over the codes where three terms would take three.

What is read of a page is in `triton_rows`, and what the codes of a trellis need besides in `triton_trellis`.
"""
# Annotations of `tl.constexpr` are read by triton, which wants them evaluated: no `from __future__` here.

import os

import triton
import triton.language as tl

from kvquant.attention.triton_rows import (
    CHANNEL,
    TOKEN,
    among_outliers,
    load_codes,
    load_highest,
    plane_channels,
    plane_numbers,
    plane_scales,
    token_scales,
)
from kvquant.attention.triton_trellis import load_sums

#: The interpreter multiplies the bits of bfloat16 as if they were integers: there its numbers go through as float32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def _cut(numbers):
    """Return the leading 8 bits of float32 numbers: what bfloat16 holds, without a rounding instruction."""
    return (numbers.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _dot(rows, numbers, total, term, stacked: tl.constexpr, exact: tl.constexpr):
    """Return ``total + rows @ numbers``.

    Args:
        rows: float32 ``[rows, n]``.
        numbers: ``[n, columns]``, bfloat16 if `exact`, else float32.
        total: float32 ``[rows, columns]``.
        term: ``[rows]``, which term of the numbers a row stands for where they are `stacked`.
        stacked, exact: whether terms have rows of their own, and whether there are terms.
    """
    if not exact:
        total = tl.dot(rows, numbers, total, input_precision="tf32x3")
    else:
        # 24 bits are 8 and 8 and 8, so the terms are all there is of a number.
        first = _cut(rows)
        second = _cut(rows - first)
        third = rows - first - second
        if stacked:
            first = tl.where((term == 0)[:, None], first, tl.where((term == 1)[:, None], second, third))
            first = tl.where((term == 3)[:, None], 0.0, first)
        if INTERPRETED:
            numbers = numbers.to(tl.float32)
        total = tl.dot(first.to(numbers.dtype), numbers, total, input_precision="ieee")
        if not stacked:
            total = tl.dot(second.to(numbers.dtype), numbers, total, input_precision="ieee")
            total = tl.dot(third.to(numbers.dtype), numbers, total, input_precision="ieee")
    return total


@triton.jit
def _soft_capped(scores, cap):
    """Return ``cap * tanh(scores / cap)``."""
    falling = tl.exp(-2.0 / cap * tl.abs(scores))
    size = cap * (1 - falling) / (1 + falling)
    return tl.where(scores < 0, -size, size)


@triton.jit
def _repeated(rows, times: tl.constexpr):
    """Return ``[times * rows]`` of ``[rows]``."""
    return tl.reshape(tl.broadcast_to(rows[None, :], [times, rows.shape[0]]), [times * rows.shape[0]])


# What changes from one step to the next, or with the page, would be compiled for again if it were specialised for.
@triton.jit(
    do_not_specialize="mask softcap mask_batch mask_head mask_group mask_query first tokens front k_start v_start "
    "blocks slot slots".split()
)
def attend_split(
    query, mask, last, softcap, shift, highest, total, mixed,
    k_codes, k_scales, k_offsets, k_table, k_outliers,
    k_code_batch, k_code_head, k_scale_batch, k_scale_head, k_outlier_batch, k_outlier_head, k_start,
    v_codes, v_scales, v_offsets, v_table, v_outliers,
    v_code_batch, v_code_head, v_scale_batch, v_scale_head, v_outlier_batch, v_outlier_head, v_start,
    mask_batch, mask_head, mask_group, mask_query, mask_token,
    first, tokens, front, blocks, slot, slots, rows, query_tokens, kv_heads,
    CAPPED: tl.constexpr, MASKED: tl.constexpr, BOOLEAN: tl.constexpr, LIMITED: tl.constexpr,
    TILE: tl.constexpr, RB: tl.constexpr,
    K_BITS: tl.constexpr, K_LOWER: tl.constexpr, K_BOOK: tl.constexpr, K_MODE: tl.constexpr, K_BY_CHANNEL: tl.constexpr,
    K_DIM: tl.constexpr, K_GROUP: tl.constexpr, K_STRIDE: tl.constexpr, K_ROW: tl.constexpr, K_PAD: tl.constexpr,
    K_PLANES: tl.constexpr, K_TERMS: tl.constexpr, K_GROUPS: tl.constexpr, K_EXPAND: tl.constexpr,
    K_EXACT: tl.constexpr, K_KEPT: tl.constexpr, K_BLOCK: tl.constexpr,
    K_SHIFTED: tl.constexpr, K_HIGH: tl.constexpr, K_LOW: tl.constexpr,
    V_BITS: tl.constexpr, V_LOWER: tl.constexpr, V_BOOK: tl.constexpr, V_MODE: tl.constexpr, V_BY_CHANNEL: tl.constexpr,
    V_DIM: tl.constexpr, V_GROUP: tl.constexpr, V_STRIDE: tl.constexpr, V_ROW: tl.constexpr, V_PAD: tl.constexpr,
    V_PLANES: tl.constexpr, V_TERMS: tl.constexpr, V_GROUPS: tl.constexpr, V_EXPAND: tl.constexpr,
    V_EXACT: tl.constexpr, V_KEPT: tl.constexpr, V_BLOCK: tl.constexpr,
    V_SHIFTED: tl.constexpr, V_HIGH: tl.constexpr, V_LOW: tl.constexpr,
):  # fmt: skip
    """Attend over tiles ``blocks * split`` on of one segment, for one key/value head and `RB` of its query rows.

    The grid is ``[splits, batch * kv_heads, row blocks]``. Results go to slot ``slot + split`` of `slots`.
    """
    split, head, row_block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    batch, kv_head = head // kv_heads, head % kv_heads
    k_codes += batch * k_code_batch + kv_head * k_code_head
    k_scales += batch * k_scale_batch + kv_head * k_scale_head
    v_codes += batch * v_code_batch + kv_head * v_code_head
    v_scales += batch * v_scale_batch + kv_head * v_scale_head
    if K_SHIFTED:
        k_offsets += batch * k_scale_batch + kv_head * k_scale_head
    if V_SHIFTED:
        v_offsets += batch * v_scale_batch + kv_head * v_scale_head
    if K_KEPT > 0:
        k_outliers += batch * k_outlier_batch + kv_head * k_outlier_head
    if V_KEPT > 0:
        v_outliers += batch * v_outlier_batch + kv_head * v_outlier_head

    # Repetitions of the query rows: which group, which term; those behind the last group are zero.
    k_repetition, v_repetition = tl.arange(0, K_EXPAND), tl.arange(0, V_EXPAND)
    k_term, v_term = tl.arange(0, RB * K_EXPAND) // RB % K_TERMS, tl.arange(0, RB * V_EXPAND) // RB % V_TERMS
    k_group = tl.arange(0, RB * K_EXPAND) // RB // K_TERMS
    k_groups, v_groups = tl.arange(0, K_GROUPS), tl.arange(0, V_GROUPS)

    row = row_block * RB + tl.arange(0, RB)
    row_ok = row < rows
    q_row = row_block * RB + tl.arange(0, RB * K_EXPAND) % RB
    q_start = query + (head * rows + q_row)[:, None] * K_DIM
    q_planes, plain_planes, q_sum = (), (), tl.zeros([K_GROUPS, RB], tl.float32)
    for plane in tl.static_range(K_PLANES):
        k_channel, k_inside = plane_channels(plane, K_DIM, K_ROW, K_PAD)
        own = k_inside[None, :] & (q_row < rows)[:, None]
        if K_MODE == TOKEN:
            own = own & (k_group[:, None] == (k_channel // K_GROUP)[None, :])
        else:
            own = own & (k_group == 0)[:, None]
        q_planes = q_planes + (tl.load(q_start + k_channel[None, :], mask=own, other=0.0),)
        plain_at = (head * rows + row)[:, None] * K_DIM + k_channel[None, :]
        plain = tl.load(query + plain_at, mask=row_ok[:, None] & k_inside[None, :], other=0.0)
        plain_planes = plain_planes + (plain,)
        if K_MODE == TOKEN:
            in_group = k_groups[:, None, None] == (k_channel // K_GROUP)[None, None, :]
            q_sum += tl.sum(tl.where(in_group, plain[None, :, :], 0.0), 2)

    if MASKED:
        mask += batch * mask_batch + kv_head * mask_head
        mask_row = (row // query_tokens) * mask_group + (row % query_tokens) * mask_query
    if shift is not None:
        lift = tl.load(shift + head * rows + row, mask=row_ok, other=0.0)
    if LIMITED:
        seen = tl.load(last + row % query_tokens)

    top = tl.full([RB], float("-inf"), tl.float32)
    weight = tl.zeros([RB], tl.float32)
    accs, from_offsets = (), tl.zeros([V_GROUPS, RB], tl.float32)
    for _plane in tl.static_range(V_PLANES):
        accs = accs + (tl.zeros([V_EXPAND * RB, V_PAD], tl.float32),)

    # A tile begins where a group does: `front` tokens of the first one lie before the segment.
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(tokens + front, TILE))):
        index = block * TILE - front + tl.arange(0, TILE)
        valid = (index >= 0) & (index < tokens)

        # ------------------------------------------------------------------------------------ scores [RB, TILE]
        token = tl.where(valid, index + k_start, 0)
        low, high = load_codes(k_codes, token, valid, K_LOWER, K_STRIDE, K_ROW, K_PAD)
        high_sums, low_sums = low, low
        if K_HIGH > 0:
            high_sums, low_sums = load_sums(
                k_codes, low, token, valid,
                K_HIGH, K_LOW, K_BY_CHANNEL, K_GROUP, K_LOWER, K_STRIDE, K_ROW, K_PAD,
            )  # fmt: skip
        expanded = tl.zeros([K_EXPAND * RB, TILE], tl.float32)
        bias = tl.zeros([RB], tl.float32)
        for plane in tl.static_range(K_PLANES):
            q, s, o = q_planes[plane], 1.0, 0.0
            if K_MODE != TOKEN:
                channel, inside = plane_channels(plane, K_DIM, K_ROW, K_PAD)
                s, o = plane_scales(
                    k_scales, k_offsets, token, valid, channel, inside,
                    K_BITS, K_BOOK, K_SHIFTED, K_MODE, K_BY_CHANNEL, K_DIM, K_GROUP,
                )  # fmt: skip
            highest_bits = low
            if K_BITS != K_LOWER:
                highest_bits = load_highest(k_codes, token, valid, plane, K_LOWER, K_STRIDE, K_DIM, K_ROW, K_PAD)
            numbers = plane_numbers(
                low, high, highest_bits, high_sums, low_sums, plane, k_table, s, o,
                K_BITS, K_LOWER, K_BOOK, K_HIGH > 0, K_MODE, K_DIM, K_ROW, K_PAD,
            )  # fmt: skip
            if K_MODE == CHANNEL:
                q = q * s
                if K_SHIFTED:
                    bias += tl.sum(plain_planes[plane] * o, 1)
            expanded = _dot(q, tl.trans(numbers), expanded, k_term, K_TERMS > 1, K_EXACT)
        scores = tl.reshape(expanded, [K_EXPAND, RB, TILE])
        if K_MODE == TOKEN:
            s, _unused = token_scales(
                k_scales, k_offsets, token, valid, k_repetition // K_TERMS, K_BITS, K_BOOK, K_SHIFTED, K_DIM // K_GROUP
            )
            scores = scores * s
        scores = tl.sum(scores, 0)
        if K_SHIFTED and K_MODE == TOKEN:
            _unused, o = token_scales(
                k_scales, k_offsets, token, valid, k_groups, K_BITS, K_BOOK, K_SHIFTED, K_DIM // K_GROUP
            )
            scores += tl.sum(q_sum[:, :, None] * o, 0)
        if K_MODE == CHANNEL:
            scores += bias[:, None]

        if CAPPED:
            if shift is not None:
                scores += lift[:, None]
            scores = _soft_capped(scores, softcap)

        shown = row_ok[:, None] & valid[None, :]
        if K_KEPT > 0:
            shown = shown & ~among_outliers(k_outliers, index + k_start, valid, K_KEPT, K_BLOCK)[None, :]
        if V_KEPT > 0:
            shown = shown & ~among_outliers(v_outliers, index + v_start, valid, V_KEPT, V_BLOCK)[None, :]
        if LIMITED:
            shown = shown & ((first + index)[None, :] <= seen[:, None])
        if MASKED:
            mask_at = mask + mask_row[:, None] + (first + index)[None, :] * mask_token
            if BOOLEAN:
                shown = shown & (tl.load(mask_at, mask=shown, other=0) != 0)
            else:
                scores += tl.load(mask_at, mask=shown, other=0.0).to(tl.float32)
        scores = tl.where(shown, scores, float("-inf"))

        # ------------------------------------------------------------------------------------ running softmax
        raised = tl.maximum(top, tl.max(scores, 1))
        # While nothing may be seen the maximum is -inf, and -inf - -inf would be NaN.
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        p = tl.exp(scores - reference[:, None])
        kept = tl.exp(top - reference)
        p_sum = tl.sum(p, 1)
        weight, top = weight * kept + p_sum, raised

        # ------------------------------------------------------------------------------------ values
        token = tl.where(valid, index + v_start, 0)
        low, high = load_codes(v_codes, token, valid, V_LOWER, V_STRIDE, V_ROW, V_PAD)
        high_sums, low_sums = low, low
        if V_HIGH > 0:
            high_sums, low_sums = load_sums(
                v_codes, low, token, valid,
                V_HIGH, V_LOW, V_BY_CHANNEL, V_GROUP, V_LOWER, V_STRIDE, V_ROW, V_PAD,
            )  # fmt: skip
        if V_MODE == TOKEN:
            s, _unused = token_scales(
                v_scales, v_offsets, token, valid, v_repetition // V_TERMS, V_BITS, V_BOOK, V_SHIFTED, V_DIM // V_GROUP
            )
            weights = p[None, :, :] * s
            if V_SHIFTED:
                _unused, o = token_scales(
                    v_scales, v_offsets, token, valid, v_groups, V_BITS, V_BOOK, V_SHIFTED, V_DIM // V_GROUP
                )
                from_offsets = from_offsets * kept[None, :] + tl.sum(p[None, :, :] * o, 2)
        else:
            weights = tl.where((v_repetition < V_TERMS)[:, None, None], p[None, :, :], 0.0)
        weights = tl.reshape(weights, [V_EXPAND * RB, TILE])
        kept_rows = _repeated(kept, V_EXPAND)
        added = ()
        for plane in tl.static_range(V_PLANES):
            acc, s, o = accs[plane] * kept_rows[:, None], 1.0, 0.0
            if V_MODE != TOKEN:
                channel, inside = plane_channels(plane, V_DIM, V_ROW, V_PAD)
                s, o = plane_scales(
                    v_scales, v_offsets, token, valid, channel, inside,
                    V_BITS, V_BOOK, V_SHIFTED, V_MODE, V_BY_CHANNEL, V_DIM, V_GROUP,
                )  # fmt: skip
            highest_bits = low
            if V_BITS != V_LOWER:
                highest_bits = load_highest(v_codes, token, valid, plane, V_LOWER, V_STRIDE, V_DIM, V_ROW, V_PAD)
            numbers = plane_numbers(
                low, high, highest_bits, high_sums, low_sums, plane, v_table, s, o,
                V_BITS, V_LOWER, V_BOOK, V_HIGH > 0, V_MODE, V_DIM, V_ROW, V_PAD,
            )  # fmt: skip
            if V_MODE == CHANNEL:
                tile = _dot(
                    weights, numbers, tl.zeros([V_EXPAND * RB, V_PAD], tl.float32), v_term, V_TERMS > 1, V_EXACT
                )
                once = tl.where(tl.arange(0, V_EXPAND * RB) < RB, _repeated(p_sum, V_EXPAND), 0.0)
                acc += tile * s + once[:, None] * o
            else:
                acc = _dot(weights, numbers, acc, v_term, V_TERMS > 1, V_EXACT)
            added = added + (acc,)
        accs = added

    at = (head * slots + slot + split) * rows + row
    tl.store(highest + at, top, mask=row_ok)
    tl.store(total + at, weight, mask=row_ok)
    for plane in tl.static_range(V_PLANES):
        channel, inside = plane_channels(plane, V_DIM, V_ROW, V_PAD)
        sums = tl.reshape(accs[plane], [V_EXPAND, RB, V_PAD])
        if V_MODE == TOKEN:
            own = (v_repetition // V_TERMS)[:, None, None] == (channel // V_GROUP)[None, None, :]
            sums = tl.where(own, sums, 0.0)
        out = tl.sum(sums, 0)
        if V_MODE == TOKEN:
            from_group = v_groups[:, None, None] == (channel // V_GROUP)[None, None, :]
            out += tl.sum(tl.where(from_group, from_offsets[:, :, None], 0.0), 0)
        tl.store(mixed + at[:, None] * V_DIM + channel[None, :], out, mask=row_ok[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["slots"])
def merge_splits(
    highest, total, mixed, out_highest, out_total, out_mixed, slots, rows,
    V_DIM: tl.constexpr, V_POW: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Merge the slots of one query row; the grid is ``[rows, batch * kv_heads]``."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, V_POW)
    top = tl.max(tl.full([STEP], float("-inf"), tl.float32), 0)
    weight = tl.sum(tl.zeros([STEP], tl.float32), 0)
    acc = tl.zeros([V_POW], tl.float32)
    for start in range(0, slots, STEP):
        slot = start + tl.arange(0, STEP)
        read = slot < slots
        at = (head * slots + slot) * rows + row
        part = tl.load(highest + at, mask=read, other=float("-inf"))
        raised = tl.maximum(top, tl.max(part, 0))
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        share, kept = tl.exp(part - reference), tl.exp(top - reference)
        sums = tl.load(total + at, mask=read, other=0.0)
        wanted = read[:, None] & (channel < V_DIM)[None, :]
        values = tl.load(mixed + at[:, None] * V_DIM + channel[None, :], mask=wanted, other=0.0)
        weight = weight * kept + tl.sum(sums * share, 0)
        acc = acc * kept + tl.sum(values * share[:, None], 0)
        top = raised
    out = head * rows + row
    tl.store(out_highest + out, top)
    tl.store(out_total + out, weight)
    tl.store(out_mixed + out * V_DIM + channel, acc, mask=channel < V_DIM)

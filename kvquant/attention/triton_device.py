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

How the rows of a product are used. A product has 16 rows at least, one query token of a group of 4 heads has 4. Its
rows are therefore `E` to a query row: *(scale group, term)* in this order. A row has one term of the query, zeroed
outside of one group of channels, so that one product gives what every group sums to apart; the same on the side of
the values, where the groups are taken apart at the very end. With 4 query rows and 2 groups, 32 rows take one pass
over the codes where three terms would take three.
"""
# Annotations of `tl.constexpr` are read by triton, which wants them evaluated: no `from __future__` here.

import os

import triton
import triton.language as tl

#: The interpreter multiplies the bits of bfloat16 as if they were integers: there its numbers go through as float32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

#: Where the scales of a side go, see `triton_kernels`.
CHANNEL = tl.constexpr(0)  # one row of scales holds for all tokens of a tile
TOKEN = tl.constexpr(1)  # scales of every token, for a few groups of channels
GENERAL = tl.constexpr(2)  # a scale for each number

#: Terms of a float32 number in bfloat16, and what they take of a power of two of rows.
TERMS = tl.constexpr(3)


@triton.jit
def _channels(head_dim: tl.constexpr, row: tl.constexpr, padded: tl.constexpr, planes: tl.constexpr):
    """Return the channel of each column of a tile ``[planes * padded]``, and whether there is one.

    A plane has `row` codes and its columns are padded to a power of two, so columns are not channels.
    """
    column = tl.arange(0, planes * padded)
    channel = (column // padded) * row + column % padded
    return channel, (column % padded < row) & (channel < head_dim)


@triton.jit
def _codes(
    codes, token, valid, nbits: tl.constexpr, stride: tl.constexpr,
    row: tl.constexpr, padded: tl.constexpr, planes: tl.constexpr,
):  # fmt: skip
    """Return codes int32 ``[tokens, planes * padded]``; each byte is loaded once, and unpacked in registers.

    Args:
        codes: the packed rows of one head.
        token, valid: ``[tokens]``, where in the page the tokens are, and whether they are to be read.
        nbits, stride: bits of a code, bytes of a packed row.
        row, padded, planes: codes of a plane, the same padded to a power of two, planes (of the low 2 bits, for 3).
    """
    width: tl.constexpr = 8 // planes
    at = tl.arange(0, padded)
    read = valid[:, None] & (at < row)[None, :]
    start = codes + token[:, None] * stride
    low = tl.load(start + at[None, :], mask=read, other=0).to(tl.int32)
    if planes == 1:
        return low
    plane = tl.arange(0, planes)[None, :, None]
    found = (low[:, None, :] >> (plane * width)) & ((1 << width) - 1)
    if nbits == 3:
        # The plane of high bits has half as many bytes, so each of its bytes is read twice, the second time from L1.
        half: tl.constexpr = row // 2
        high = tl.load(start + row + (at % half)[None, :], mask=read, other=0).to(tl.int32)
        shift = plane * 2 + (at >= half)[None, None, :].to(tl.int32)
        found = found | (((high[:, None, :] >> shift) & 1) << 2)
    return tl.reshape(found, [low.shape[0], planes * padded])


@triton.jit
def _numbers(codes, table, scale, offset, nbits: tl.constexpr, codebook: tl.constexpr, mode: tl.constexpr):
    """Return what stands for codes ``[tokens, columns]`` in a product: bfloat16 where that is exact, else float32.

    Up to 4 bits the code is put behind a bfloat16's exponent, which gives ``1 + code / 2**nbits`` for two cheap
    operations; `_folded` undoes it. Conversions from integers run at a quarter to a half of the rate of arithmetic.
    """
    if codebook:
        numbers = tl.load(table + codes)
        if mode == GENERAL:
            numbers = numbers * scale
    elif mode == GENERAL:
        numbers = codes.to(tl.float32) * scale + offset
    elif nbits == 8:
        numbers = codes.to(tl.float32).to(tl.bfloat16)
    else:
        numbers = (codes << (7 - nbits) | 0x3F80).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return numbers


@triton.jit
def _folded(scales, offsets, at, read, nbits: tl.constexpr, codebook: tl.constexpr, mode: tl.constexpr):
    """Load scales and offsets at `at` where `read`, zeros elsewhere, for what `_numbers` returns.

    Spare capacity holds anything, NaN too, so nothing may be read behind the valid tokens.
    """
    scale = tl.load(scales + at, mask=read, other=0.0).to(tl.float32)
    if codebook:
        return scale, scale * 0.0
    offset = tl.load(offsets + at, mask=read, other=0.0).to(tl.float32)
    if mode != GENERAL and nbits < 8:
        # code * s + o = (1 + code / 2^nbits) * (s * 2^nbits) + (o - s * 2^nbits)
        scale = scale * (1 << nbits)
        offset = offset - scale
    return scale, offset


@triton.jit
def _scales(
    scales, offsets, token, valid, channel, inside, group,
    nbits: tl.constexpr, codebook: tl.constexpr, mode: tl.constexpr, by_channel: tl.constexpr,
    group_size: tl.constexpr, stride: tl.constexpr, groups: tl.constexpr,
):  # fmt: skip
    """Return scales and offsets of a tile: ``[1, columns]``, ``[E, tokens]`` or ``[tokens, columns]``, by `mode`."""
    if mode == CHANNEL:
        at = tl.max(token // group_size, 0) * stride + channel[None, :]
        read = inside[None, :]
    elif mode == TOKEN:
        at = token[None, :] * stride + group[:, None]
        read = valid[None, :] & (group < groups)[:, None]
    else:
        read = valid[:, None] & inside[None, :]
        if by_channel:
            at = (token // group_size)[:, None] * stride + channel[None, :]
        else:
            at = token[:, None] * stride + (channel // group_size)[None, :]
    return _folded(scales, offsets, at, read, nbits, codebook, mode)


@triton.jit
def _terms(rows, term, stacked: tl.constexpr, exact: tl.constexpr):
    """Return float32 `rows` ``[rows, n]`` as three operands, of which the second and third count where not `stacked`.

    Args:
        rows: the numbers.
        term: ``[rows]``, which term a row holds, where they are stacked.
        stacked: whether the terms have rows of their own.
        exact: whether bfloat16 terms are wanted; else the numbers are returned as they are.
    """
    if not exact:
        return rows, rows, rows
    first = rows.to(tl.bfloat16)
    rest = rows - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    if stacked:
        held = tl.where((term == 0)[:, None], first.to(tl.float32), 0.0)
        held = tl.where((term == 1)[:, None], second.to(tl.float32), held)
        held = tl.where((term == 2)[:, None], third.to(tl.float32), held)
        first = held.to(tl.bfloat16)
    return first, second, third


@triton.jit
def _dot(first, second, third, numbers, total, stacked: tl.constexpr, exact: tl.constexpr):
    """Return ``total + (first + second + third) @ numbers``."""
    if not exact:
        return tl.dot(first, numbers, total, input_precision="tf32x3")
    if INTERPRETED:
        first, second, third = first.to(tl.float32), second.to(tl.float32), third.to(tl.float32)
        numbers = numbers.to(tl.float32)
    total = tl.dot(first, numbers, total, input_precision="ieee")
    if not stacked:
        total = tl.dot(second, numbers, total, input_precision="ieee")
        total = tl.dot(third, numbers, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["first", "tokens", "front", "k_start", "v_start", "blocks", "slot", "slots"])
def attend_split(
    query, mask, last, highest, total, mixed,
    k_codes, k_scales, k_offsets, k_table, k_code_batch, k_code_head, k_scale_batch, k_scale_head, k_start,
    v_codes, v_scales, v_offsets, v_table, v_code_batch, v_code_head, v_scale_batch, v_scale_head, v_start,
    mask_batch, mask_head, mask_group, mask_query, mask_token,
    first, tokens, front, blocks, slot, slots, rows, query_tokens, kv_heads,
    MASKED: tl.constexpr, BOOLEAN: tl.constexpr, LIMITED: tl.constexpr, TILE: tl.constexpr, RB: tl.constexpr,
    K_BITS: tl.constexpr, K_BOOK: tl.constexpr, K_MODE: tl.constexpr, K_BY_CHANNEL: tl.constexpr,
    K_DIM: tl.constexpr, K_GROUP: tl.constexpr, K_STRIDE: tl.constexpr, K_ROW: tl.constexpr, K_PAD: tl.constexpr,
    K_PLANES: tl.constexpr, K_EXPAND: tl.constexpr, K_STACKED: tl.constexpr, K_EXACT: tl.constexpr,
    V_BITS: tl.constexpr, V_BOOK: tl.constexpr, V_MODE: tl.constexpr, V_BY_CHANNEL: tl.constexpr,
    V_DIM: tl.constexpr, V_GROUP: tl.constexpr, V_STRIDE: tl.constexpr, V_ROW: tl.constexpr, V_PAD: tl.constexpr,
    V_PLANES: tl.constexpr, V_EXPAND: tl.constexpr, V_STACKED: tl.constexpr, V_EXACT: tl.constexpr,
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
    if not K_BOOK:
        k_offsets += batch * k_scale_batch + kv_head * k_scale_head
    if not V_BOOK:
        v_offsets += batch * v_scale_batch + kv_head * v_scale_head

    k_channel, k_inside = _channels(K_DIM, K_ROW, K_PAD, K_PLANES)
    v_channel, v_inside = _channels(V_DIM, V_ROW, V_PAD, V_PLANES)
    # Rows of the products: `*_EXPAND` to a query row, (group, term).
    k_expanded, v_expanded = tl.arange(0, RB * K_EXPAND), tl.arange(0, RB * V_EXPAND)
    k_terms: tl.constexpr = 4 if K_STACKED else 1
    v_terms: tl.constexpr = 4 if V_STACKED else 1
    k_group, k_term = k_expanded % K_EXPAND // k_terms, k_expanded % k_terms
    v_term = v_expanded % v_terms
    k_group_of, v_group_of = tl.arange(0, K_EXPAND) // k_terms, tl.arange(0, V_EXPAND) // v_terms
    v_first_of = tl.arange(0, V_EXPAND) % v_terms == 0
    v_one = v_expanded % V_EXPAND == 0

    q_row = row_block * RB + k_expanded // K_EXPAND
    q_at = (head * rows + q_row)[:, None] * K_DIM + k_channel[None, :]
    if K_MODE == TOKEN:
        q_read = (q_row < rows)[:, None] & k_inside[None, :] & (k_group[:, None] == (k_channel // K_GROUP)[None, :])
    else:
        q_read = ((q_row < rows) & (k_group == 0))[:, None] & k_inside[None, :]
    q = tl.load(query + q_at, mask=q_read, other=0.0)
    q1, q2, q3 = _terms(q, k_term, K_STACKED, K_EXACT)
    q_sum = tl.where(k_term == 0, tl.sum(q, 1), 0.0)

    row = row_block * RB + tl.arange(0, RB)
    row_ok = row < rows
    if MASKED:
        mask += batch * mask_batch + kv_head * mask_head
        mask_row = (row // query_tokens) * mask_group + (row % query_tokens) * mask_query
    if LIMITED:
        seen = tl.load(last + row % query_tokens)

    top = tl.full([RB], float("-inf"), tl.float32)
    weight = tl.zeros([RB], tl.float32)
    acc = tl.zeros([RB * V_EXPAND, V_PLANES * V_PAD], tl.float32)
    acc_offset = tl.zeros([RB * V_EXPAND], tl.float32)

    # A tile begins where a group does: `front` tokens of the first one lie before the segment.
    for block in range(split * blocks, tl.minimum((split + 1) * blocks, tl.cdiv(tokens + front, TILE))):
        index = block * TILE - front + tl.arange(0, TILE)
        valid = (index >= 0) & (index < tokens)

        # ------------------------------------------------------------------------------------ scores [RB, TILE]
        token = tl.where(valid, index + k_start, 0)
        s, o = _scales(
            k_scales, k_offsets, token, valid, k_channel, k_inside, k_group_of,
            K_BITS, K_BOOK, K_MODE, K_BY_CHANNEL, K_GROUP, K_DIM if K_BY_CHANNEL else K_DIM // K_GROUP,
            1 if K_BY_CHANNEL else K_DIM // K_GROUP,
        )  # fmt: skip
        codes = _codes(k_codes, token, valid, K_BITS, K_STRIDE, K_ROW, K_PAD, K_PLANES)
        numbers = tl.trans(_numbers(codes, k_table, s, o, K_BITS, K_BOOK, K_MODE))
        if K_MODE == CHANNEL:
            q1, q2, q3 = _terms(q * s, k_term, K_STACKED, K_EXACT)
            q_sum = tl.where(k_term == 0, tl.sum(q * o, 1), 0.0)
        expanded = tl.zeros([RB * K_EXPAND, TILE], tl.float32)
        expanded = _dot(q1, q2, q3, numbers, expanded, K_STACKED, K_EXACT)
        if K_MODE == CHANNEL:
            expanded += q_sum[:, None]
        scores = tl.reshape(expanded, [RB, K_EXPAND, TILE])
        if K_MODE == TOKEN:
            scores = scores * s[None, :, :] + tl.reshape(q_sum, [RB, K_EXPAND])[:, :, None] * o[None, :, :]
        scores = tl.sum(scores, 1)

        shown = row_ok[:, None] & valid[None, :]
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
        kept = tl.reshape(tl.broadcast_to(kept[:, None], [RB, V_EXPAND]), [RB * V_EXPAND])

        # ------------------------------------------------------------------------------------ values
        token = tl.where(valid, index + v_start, 0)
        s, o = _scales(
            v_scales, v_offsets, token, valid, v_channel, v_inside, v_group_of,
            V_BITS, V_BOOK, V_MODE, V_BY_CHANNEL, V_GROUP, V_DIM if V_BY_CHANNEL else V_DIM // V_GROUP,
            1 if V_BY_CHANNEL else V_DIM // V_GROUP,
        )  # fmt: skip
        codes = _codes(v_codes, token, valid, V_BITS, V_STRIDE, V_ROW, V_PAD, V_PLANES)
        numbers = _numbers(codes, v_table, s, o, V_BITS, V_BOOK, V_MODE)
        if V_MODE == TOKEN:
            weights = p[:, None, :] * s[None, :, :]
            offset = tl.sum(p[:, None, :] * o[None, :, :], 2)
            offset = tl.where(v_first_of[None, :], offset, 0.0)
            acc_offset = acc_offset * kept + tl.reshape(offset, [RB * V_EXPAND])
        else:
            weights = tl.where((v_group_of == 0)[None, :, None], p[:, None, :], 0.0)
        weights = tl.reshape(weights, [RB * V_EXPAND, TILE])
        p1, p2, p3 = _terms(weights, v_term, V_STACKED, V_EXACT)
        acc = acc * kept[:, None]
        if V_MODE == CHANNEL:
            tile = tl.zeros([RB * V_EXPAND, V_PLANES * V_PAD], tl.float32)
            tile = _dot(p1, p2, p3, numbers, tile, V_STACKED, V_EXACT)
            sums = tl.reshape(tl.broadcast_to(p_sum[:, None], [RB, V_EXPAND]), [RB * V_EXPAND])
            acc += tile * s + tl.where(v_one, sums, 0.0)[:, None] * o
        else:
            acc = _dot(p1, p2, p3, numbers, acc, V_STACKED, V_EXACT)

    if V_MODE == TOKEN:
        own = (v_expanded % V_EXPAND // v_terms)[:, None] == (v_channel // V_GROUP)[None, :]
        acc = tl.where(own, acc + acc_offset[:, None], 0.0)
    out = tl.sum(tl.reshape(acc, [RB, V_EXPAND, V_PLANES * V_PAD]), 1)
    at = (head * slots + slot + split) * rows + row
    tl.store(highest + at, top, mask=row_ok)
    tl.store(total + at, weight, mask=row_ok)
    tl.store(mixed + at[:, None] * V_DIM + v_channel[None, :], out, mask=row_ok[:, None] & v_inside[None, :])


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

"""What runs on the device: packed rows of a page become the numbers of a product, with their scales and offsets.

Imports triton, so it is imported by `triton_device` alone. What is a trellis's own is in `triton_trellis`.

A plane of a byte (see `kvquant.engine.packing`) is a run of channels and has a product of its
own: its operand is a shift and a mask of the bytes as they were loaded, nothing is interleaved or laid out anew.
Tuples of tensors hold what there is of each plane. Of a mixed width the planes are those of the width below; the
highest bits of the first half are loaded beside each plane, eight lanes from one byte.
"""
# Annotations of `tl.constexpr` are read by triton, which wants them evaluated: no `from __future__` here.

import triton
import triton.language as tl

from kvquant.attention.triton_trellis import level_indices
from kvquant.engine import scales

#: How scales and offsets are written in bytes, see `kvquant.engine.scales`.
LOWEST_EXPONENT = tl.constexpr(scales.LOWEST_EXPONENT)
PARTS, CENTER = tl.constexpr(scales.PARTS), tl.constexpr(scales.CENTER)
TABLE_SPAN = tl.constexpr(scales.TABLE_SPAN)

#: Where the scales of a side go: to all tokens of a tile, to each token, to each number; see `triton_kernels`.
CHANNEL, TOKEN, GENERAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def plane_channels(plane: tl.constexpr, head_dim: tl.constexpr, row: tl.constexpr, padded: tl.constexpr):
    """Return the channels of a plane of `row` codes ``[padded]``, and which of them there are."""
    at = tl.arange(0, padded)
    return plane * row + at, (at < row) & (plane * row + at < head_dim)


@triton.jit
def load_codes(codes, token, valid, lower: tl.constexpr, stride: tl.constexpr, row: tl.constexpr, padded: tl.constexpr):
    """Load packed rows, each byte once: the bytes of the planes, and of the plane of high bits for 3 bits.

    Args:
        codes: the packed rows of one head, `stride` bytes each.
        token, valid: ``[tokens]``, where in the page the tokens are, and whether they are to be read.
        lower: bits of a code, of a mixed width those of the second half.
        row, padded: codes of a plane (for 3 bits, of the planes of low bits), the same padded to a power of two.

    Returns:
        uint8 ``[tokens, padded]``, twice.
    """
    at = tl.arange(0, padded)
    start = codes + (token * stride)[:, None]
    if row == padded:
        read = tl.broadcast_to(valid[:, None], [token.shape[0], padded])
    else:
        read = valid[:, None] & (at < row)[None, :]
    low = tl.load(start + at[None, :], mask=read, other=0)
    high = low
    if lower == 3:
        # There are half as many bytes of high bits, so each is read twice, the second time from L1.
        high = tl.load(start + row + (at % (row // 2))[None, :], mask=read, other=0)
    return low, high


@triton.jit
def load_highest(
    codes, token, valid, plane: tl.constexpr,
    lower: tl.constexpr, stride: tl.constexpr, head_dim: tl.constexpr, row: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Load the highest bits of the codes of a plane, which the first half of the channels has: ``[tokens, padded]``."""
    channel, inside = plane_channels(plane, head_dim // 2, row, padded)
    start = codes + (token * stride)[:, None] + (head_dim + 7) // 8 * lower
    found = tl.load(start + (channel // 8)[None, :], mask=valid[:, None] & inside[None, :], other=0)
    return (found >> (channel % 8)[None, :].to(tl.uint8)) & 1


@triton.jit
def plane_numbers(
    low, high, highest, high_sums, low_sums, plane: tl.constexpr, table, scale, offset,
    nbits: tl.constexpr, lower: tl.constexpr, codebook: tl.constexpr, trellis: tl.constexpr, mode: tl.constexpr,
    head_dim: tl.constexpr, row: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Return what stands for the codes of a plane in a product: bfloat16 where that is exact, else float32.

    Up to 4 bits the code is put behind a bfloat16's exponent, which gives ``1 + code / 2**nbits`` for one cheap
    operation; `load_folded` undoes it. Conversions from integers run at a half of the rate of arithmetic at best.
    """
    width: tl.constexpr = 2 if lower == 3 else lower
    codes = (low >> (plane * width)) & ((1 << width) - 1)
    if lower == 3:
        second = (tl.arange(0, padded) >= row // 2).to(tl.uint8)  # the plane of high bits has half as many bytes
        codes = codes | (((high >> (plane * 2 + second)[None, :].to(tl.uint8)) & 1) << 2)
    if nbits != lower:
        codes = codes | (highest << lower)
    if trellis:
        codes = level_indices(codes, high_sums, low_sums, plane * width)
    if codebook:
        entries = codes.to(tl.int32)
        if nbits != lower:  # the second half of the channels has its own table, behind that of the first
            channel, _inside = plane_channels(plane, head_dim, row, padded)
            entries += tl.where(channel >= head_dim // 2, 1 << nbits, 0)[None, :]
        numbers = tl.load(table + entries)
        if mode == GENERAL:
            numbers = numbers * scale + offset
    elif mode == GENERAL:
        numbers = codes.to(tl.float32) * scale + offset
    elif nbits == 8:
        numbers = codes.to(tl.float32).to(tl.bfloat16)
    else:
        numbers = (codes.to(tl.uint16) << (7 - nbits) | 0x3F80).to(tl.bfloat16, bitcast=True)
    return numbers


@triton.jit
def load_folded(
    scales, offsets, at, read,
    nbits: tl.constexpr, codebook: tl.constexpr, shifted: tl.constexpr, mode: tl.constexpr,
):  # fmt: skip
    """Load scales and offsets at `at` where `read`, zeros elsewhere, for what `plane_numbers` returns.

    There are offsets where groups are `shifted`: in the affine format, and in that of a trellis if it has them.
    Spare capacity holds anything, NaN too, so nothing may be read behind the valid tokens.
    """
    stored = tl.load(scales + at, mask=read, other=0)
    in_bytes: tl.constexpr = stored.dtype == tl.uint8
    if in_bytes:  # a byte in front of the fraction of a float32, see `kvquant.engine.scales`
        number = ((stored.to(tl.int32) << 20) + ((127 + LOWEST_EXPONENT) << 23)).to(tl.float32, bitcast=True)
        scale = tl.where(read, number, 0.0)
    else:
        scale = stored.to(tl.float32)
    offset = tl.zeros_like(scale)
    if shifted:
        place = tl.load(offsets + at, mask=read, other=0).to(tl.float32)
        if in_bytes:
            span: tl.constexpr = TABLE_SPAN if codebook else 1 << nbits
            middle: tl.constexpr = 0 if codebook else ((1 << nbits) - 1) / 2
            offset = ((place - CENTER) * (span / PARTS) - middle) * scale
        else:
            offset = place
        if not codebook and mode != GENERAL and nbits < 8:
            # code * s + o = (1 + code / 2^nbits) * (s * 2^nbits) + (o - s * 2^nbits)
            scale = scale * (1 << nbits)
            offset = offset - scale
    return scale, offset


@triton.jit
def plane_scales(
    scales, offsets, token, valid, channel, inside,
    nbits: tl.constexpr, codebook: tl.constexpr, shifted: tl.constexpr, mode: tl.constexpr, by_channel: tl.constexpr,
    head_dim: tl.constexpr, group_size: tl.constexpr,
):  # fmt: skip
    """Return scales and offsets of a plane: ``[1, padded]`` (`CHANNEL`) or ``[tokens, padded]`` (`GENERAL`)."""
    if mode == CHANNEL:
        at, read = tl.max(token // group_size, 0) * head_dim + channel[None, :], inside[None, :]
    elif by_channel:
        at, read = (token // group_size)[:, None] * head_dim + channel[None, :], valid[:, None] & inside[None, :]
    else:
        at = token[:, None] * (head_dim // group_size) + (channel // group_size)[None, :]
        read = valid[:, None] & inside[None, :]
    return load_folded(scales, offsets, at, read, nbits, codebook, shifted, mode)


@triton.jit
def token_scales(
    scales, offsets, token, valid, group,
    nbits: tl.constexpr, codebook: tl.constexpr, shifted: tl.constexpr, groups: tl.constexpr,
):  # fmt: skip
    """Return scales and offsets ``[len(group), 1, tokens]`` of `groups` groups of channels (`TOKEN`)."""
    at = token[None, None, :] * groups + group[:, None, None]
    read = valid[None, None, :] & (group < groups)[:, None, None]
    return load_folded(scales, offsets, at, read, nbits, codebook, shifted, TOKEN)


@triton.jit
def among_outliers(positions, token, valid, kept: tl.constexpr, block: tl.constexpr):
    """Return which of the tokens ``[tokens]`` of a page are outliers, `kept` in each block, which attend elsewhere."""
    found = token < 0
    for index in range(kept):
        place = tl.load(positions + token // block * kept + index, mask=valid, other=-1)
        found = found | (place == token % block)
    return found

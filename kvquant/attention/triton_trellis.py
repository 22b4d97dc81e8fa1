"""What runs on the device: which entries of their table the codes of a trellis stand for, see `kvquant.engine.trellis`.

Imports triton, so it is imported by `triton_device` and `triton_rows` alone.

The two sums are over the lowest bits of codes, and the codes of a packed row lie side by side. So whole bytes are
summed, whatever else is in them: an operation a byte for each tap, where codes would take one for each plane too. A
plane's sums then lie where its codes do. Bytes of the numbers before are loaded again, as there is no shifting of lanes
in a tile: they were read for this tile or for the one before, so they come from L1.
"""
# Annotations of `tl.constexpr` are read by triton, which wants them evaluated: no `from __future__` here.

import triton
import triton.language as tl

from kvquant.engine import trellis

MOST_MEMORY = tl.constexpr(trellis.MOST_MEMORY)


@triton.jit
def load_sums(
    codes, packed, token, valid,
    high: tl.constexpr, low: tl.constexpr, by_channel: tl.constexpr, group_size: tl.constexpr,
    nbits: tl.constexpr, stride: tl.constexpr, row: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Return the sums that choose a set of levels, for its high and for its low bit, where the codes' lowest bits are.

    Args:
        codes: the packed rows of one head, `stride` bytes each.
        packed: their first `row` bytes as they were loaded, uint8 ``[tokens, padded]``.
        token, valid: ``[tokens]``, where in the page the tokens are, and whether they are to be read.
        high, low: taps of the trellis.
        by_channel: whether rows of `group_size` numbers go along the tokens; else along the channels.
        nbits: bits of a code.
        row, padded: codes of a plane, the same padded to a power of two.

    Returns:
        uint8 ``[tokens, padded]``, twice; bits above the lowest of a code hold anything.
    """
    width: tl.constexpr = 2 if nbits == 3 else nbits  # of a code in those bytes
    high_sums, low_sums = tl.zeros_like(packed), tl.zeros_like(packed)
    for back in tl.static_range(MOST_MEMORY + 1):
        if (high | low) >> back & 1:
            past = packed
            if back > 0:
                if by_channel:
                    past = _of_token_before(codes, token, valid, back, group_size, stride, row, padded)
                else:
                    past = _of_channel_before(codes, token, valid, back, group_size, width, stride, row, padded)
            if high >> back & 1:
                high_sums ^= past
            if low >> back & 1:
                low_sums ^= past
    return high_sums, low_sums


@triton.jit
def _of_token_before(
    codes, token, valid, back: tl.constexpr, group_size: tl.constexpr,
    stride: tl.constexpr, row: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Load the bytes of `back` tokens before, zeros where the group begins later."""
    at = tl.arange(0, padded)
    inside = valid & (token % group_size >= back)
    start = codes + ((token - back) * stride)[:, None]
    return tl.load(start + at[None, :], mask=inside[:, None] & (at < row)[None, :], other=0)


@triton.jit
def _of_channel_before(
    codes, token, valid, back: tl.constexpr, group_size: tl.constexpr,
    width: tl.constexpr, stride: tl.constexpr, row: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Load the bytes of `back` channels before, zeros where the group begins later.

    The channel before the first of a plane is the last of the plane below, whose bits are further right in a byte.
    """
    at = tl.arange(0, padded)
    most: tl.constexpr = (back + row - 1) // row  # planes that are gone down, at most
    place = at + (most * row - back)
    found = tl.load(
        codes + (token * stride)[:, None] + (place % row)[None, :], mask=valid[:, None] & (at < row)[None, :], other=0
    )
    raised = found.to(tl.int32) << ((most - place // row) * width)[None, :]
    kept = tl.zeros([padded], tl.int32)
    for plane in tl.static_range(8 // width):
        inside = (plane * row + at) % group_size >= back
        kept |= tl.where(inside, ((1 << width) - 1) << (plane * width), 0)
    return (raised & kept[None, :]).to(tl.uint8)


@triton.jit
def level_indices(codes, high_sums, low_sums, begin: tl.constexpr):
    """Return which entries of the table the codes of a plane stand for, uint8 ``[tokens, padded]``.

    Args:
        codes: of the plane, uint8 ``[tokens, padded]``.
        high_sums, low_sums: as `load_sums` returns them.
        begin: the bit of a byte with which codes of the plane begin.
    """
    chosen = ((high_sums >> begin) & 1) << 1 | ((low_sums >> begin) & 1)
    return (codes >> 1) << 2 | chosen

"""Codes of a trellis, read by the kernel: rows of packed codes become rows of packed indices into the table.

Indices have one bit more than codes, and are packed as codes of 2 or 4 bits are (see `kvquant.engine.packing`). What
goes into the register is one bit of each code, and the bits of a packed row lie side by side. So a row of them is
shifted and summed as one vector of bytes: some forty instructions for a token's head, however many queries there are.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kvquant.attention.numba_pages import ROW
from kvquant.attention.simd import pointer_to
from kvquant.engine.trellis import MOST_MEMORY

_BYTE, _LONG = ir.IntType(8), ir.IntType(64)


def index_bits(nbits: int) -> int:
    """Return the bits in which indices of codes of `nbits` bits are packed."""
    return 2 if nbits == 1 else 4


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
    """Write the indices of `count` tokens to `work.expanded`.

    Args:
        page, position, count, work, shape, bits, per: as for the other functions of a block.
        codes: address of the first token's packed codes.
        channel: whether rows go along the tokens; else along the channels.
        high, low: taps of the trellis.
    """
    apart, out = page[ROW], work.expanded.ctypes.data
    for t in range(count):
        inside = (position + t) % per
        target = pointer_to(out + t * work.expanded.shape[1], 0)
        expand_row(pointer_to(codes + t * apart, 0), apart, inside, target, shape, bits, per, channel, high, low)


@intrinsic(prefer_literal=True)
def expand_row(  # noqa: C901 # one row, built whole
    _context: Any,
    row: Any,
    apart: Any,
    inside: Any,
    out: Any,
    width: Any,
    bits: Any,
    per: Any,
    channel: Any,
    high: Any,
    low: Any,
) -> Any:
    """Write the indices of one row.

    Args:
        row: uint8 pointer to its packed codes; those of the token before are `apart` bytes before.
        inside: where in its group the token is, for rows that go along the tokens.
        out: uint8 pointer.
        width, bits, per, channel, high, low: literals.
    """
    shape, nbits, group = (kind.literal_value for kind in (width, bits, per))
    along_tokens, taps = bool(channel.literal_value), (high.literal_value, low.literal_value)
    planes = min(nbits, 2)
    plane = -(-shape // 8) * planes  # bytes
    vector = ir.VectorType(_BYTE, plane)
    pointer = types.CPointer(types.uint8)
    signature = types.void(pointer, types.int64, types.int64, pointer, width, bits, per, channel, high, low)

    def constant(numbers: list[int]) -> ir.Constant:
        return ir.Constant(vector, numbers)

    def load(builder: Any, address: Any, size: int) -> Any:
        return builder.load(builder.bitcast(address, ir.VectorType(_BYTE, size).as_pointer()), align=1)

    def of_token(builder: Any, arguments: Any, back: int) -> Any:
        """Return the codes of `back` tokens before, or zeros before the first of the group."""
        start, step, place = arguments[:3]
        if not back:
            return load(builder, start, plane)
        there = builder.icmp_signed(">=", place, _LONG(back))
        before = builder.gep(start, [builder.mul(step, _LONG(-back))])
        codes = load(builder, builder.select(there, before, start), plane)
        return builder.select(there, codes, constant([0] * plane))

    def of_channel(builder: Any, codes: Any, back: int) -> Any:
        """Return the codes of `back` channels before, or zeros before the first of the group."""
        kept = [
            sum((2**planes - 1) << index * planes for index in range(8 // planes) if _place(index, j) >= back)
            for j in range(plane)
        ]
        for step in [plane] * (back // plane) + [back % plane]:
            # The channel before the first of a plane is the last of the plane below, whose bits are further right.
            raised = builder.shl(codes, constant([planes] * plane))
            lanes = [j - step if j >= step else 2 * plane - step + j for j in range(plane)]
            picked = ir.Constant(ir.VectorType(ir.IntType(32), plane), lanes)
            codes = builder.shuffle_vector(codes, raised, picked)
        return builder.and_(codes, constant(kept))

    def _place(index: int, j: int) -> int:
        """Return where in its group the channel of byte `j` and plane `index` is."""
        place: int = (index * plane + j) % group
        return place

    def indices(builder: Any, codes: Any, high: Any, low: Any, third: Any) -> Any:
        """Return the indices as a vector of twice as many bytes: those of the even planes, then those of the odd."""
        doubled = ir.Constant(ir.VectorType(ir.IntType(32), 2 * plane), [j % plane for j in range(2 * plane)])
        shifts = ir.Constant(ir.VectorType(_BYTE, 2 * plane), [0] * plane + [planes] * plane)
        kept = 0x55 if nbits == 1 else 0x11  # the lowest bit of each index

        def spread(vector: Any, raised: int) -> Any:
            both = builder.lshr(builder.shuffle_vector(vector, vector, doubled), shifts)
            bits = builder.and_(both, ir.Constant(both.type, [kept] * 2 * plane))
            return builder.shl(bits, ir.Constant(both.type, [raised] * 2 * plane)) if raised else bits

        result = builder.or_(spread(low, 0), spread(high, 1))
        if nbits > 1:
            second = builder.lshr(codes, constant([1] * plane))
            result = builder.or_(result, spread(second, 2))
        if nbits > 2:
            # The plane of third bits has half as many bytes, eight codes to each.
            half = plane // 2
            four = ir.Constant(ir.VectorType(ir.IntType(32), 2 * plane), [j % half for j in range(2 * plane)])
            places = ir.Constant(shifts.type, [j // half for j in range(2 * plane)])
            bits = builder.lshr(builder.shuffle_vector(third, third, four), places)
            bits = builder.and_(bits, ir.Constant(bits.type, [kept] * 2 * plane))
            result = builder.or_(result, builder.shl(bits, ir.Constant(bits.type, [3] * 2 * plane)))
        return result

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        codes = load(builder, arguments[0], plane)
        sums = [constant([0] * plane), constant([0] * plane)]
        for back in range(MOST_MEMORY + 1):
            if (taps[0] | taps[1]) >> back & 1:
                past = of_token(builder, arguments, back) if along_tokens else of_channel(builder, codes, back)
                sums = [builder.xor(one, past) if tap >> back & 1 else one for one, tap in zip(sums, taps, strict=True)]
        third = load(builder, builder.gep(arguments[0], [_LONG(plane)]), plane // 2) if nbits == 3 else None
        result = indices(builder, codes, sums[0], sums[1], third)
        builder.store(result, builder.bitcast(arguments[3], result.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return signature, generate

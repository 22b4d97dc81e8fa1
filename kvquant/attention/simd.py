"""Inner loops over packed codes, written as vector instructions for numba.

Compilers do not see that a row of packed codes is a few runs of contiguous ones, so the two loops that matter are
built in LLVM's language, unrolled for one width, head size and number of queries: `dot_rows` multiplies codes with
queries, `mix_rows` sums codes by weights. Codes become numbers in registers only.

Everything that shapes the loops is a literal integer. LLVM turns the vectors into what the processor has.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvquant.attention.simd_rows import LANES, PERMUTES, UNROLL, Bits, Run, runs
from kvquant.engine.scales import LOWEST_EXPONENT

#: Sums of `mix_rows` that are kept in registers at once.
_SUMS = 16 if LANES == 16 else 8

_FLOAT, _HALF, _BYTE, _INT, _LONG = ir.FloatType(), ir.HalfType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)


# ------------------------------------------------------------------------------------------------ pieces of code


def _vector(kind: ir.Type, length: int) -> ir.Type:
    return ir.VectorType(kind, length)


def _constant(value: float, length: int, kind: ir.Type = _INT) -> ir.Constant:
    return ir.Constant(_vector(kind, length), [value] * length)


def _load(builder: Any, pointer: Any, kind: ir.Type, length: int, align: int) -> Any:
    return builder.load(builder.bitcast(pointer, _vector(kind, length).as_pointer()), align=align)


def _call(builder: Any, name: str, result: ir.Type, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _fused(builder: Any, x: Any, y: Any, total: Any) -> Any:
    """Return ``x * y + total``."""
    return _call(builder, f"llvm.fma.v{x.type.count}f32", x.type, [x, y, total])


def _splat(builder: Any, number: Any, length: int) -> Any:
    empty = ir.Constant(_vector(_FLOAT, length), ir.Undefined)
    filled = builder.insert_element(empty, number, _INT(0))
    return builder.shuffle_vector(filled, empty, _constant(0, length))


def _numbers(builder: Any, row: Any, run: Run, table: Any, entries: int) -> Any:
    """Return the codes of a run as floats, or the entries of a table that they name."""
    by_register = LANES == run.length == 16 and (entries == 16 or (not entries and run.mask < 16))
    by_half_register = PERMUTES and run.length <= 8 and entries in (8, 16)
    lone = len(run.fields) == 1 and run.highest is None
    unmasked = lone and (by_register or (by_half_register and entries == 8))
    codes = None
    for field in run.fields:
        part = _load(builder, builder.gep(row, [_LONG(field.byte)]), _BYTE, run.length, 1)
        part = builder.zext(part, _vector(_INT, run.length))
        if field.shift:
            part = builder.lshr(part, _constant(field.shift, run.length))
        if field.mask != 255 and not unmasked:
            part = builder.and_(part, _constant(field.mask, run.length))
        if field.raised:
            part = builder.shl(part, _constant(field.raised, run.length))
        codes = part if codes is None else builder.or_(codes, part)
    if run.highest is not None:
        bits = _bits(builder, row, run.highest, run.length)
        raised = _constant(1 << run.highest.raised, run.length)
        codes = builder.or_(codes, builder.select(bits, raised, _constant(0, run.length)))
    if run.table and entries:
        table = builder.gep(table, [_LONG(run.table)])
    if by_register:
        # A register of sixteen numbers is looked up by the low four bits of each code, in one instruction, which is
        # less than masking and converting. Its entries repeat where a code has fewer bits.
        counted = ir.Constant(_vector(_FLOAT, 16), [float(entry & run.mask) for entry in range(16)])
        held = _load(builder, table, _FLOAT, 16, 4) if entries else counted
        return _call(builder, "llvm.x86.avx512.permvar.sf.512", held.type, [held, codes])
    if not entries:
        return builder.sitofp(codes, _vector(_FLOAT, run.length))
    if by_half_register:
        return _permuted(builder, codes, table, entries)
    return _gathered(builder, codes, table)


def _permuted(builder: Any, codes: Any, table: Any, entries: int) -> Any:
    """Look 8 or 16 entries up in registers of eight: that of the low three bits, chosen between by the fourth."""
    length = codes.type.count
    lanes = ir.Constant(_vector(_INT, 8), [lane % length for lane in range(8)])
    wide = codes if length == 8 else builder.shuffle_vector(codes, codes, lanes)
    held = [_load(builder, builder.gep(table, [_LONG(first)]), _FLOAT, 8, 4) for first in range(0, entries, 8)]
    low, *above = (_call(builder, "llvm.x86.avx2.permps", register.type, [register, wide]) for register in held)
    if above:
        low = builder.select(builder.icmp_unsigned(">=", wide, _constant(8, 8)), above[0], low)
    if length == 8:
        return low
    return builder.shuffle_vector(low, low, ir.Constant(_vector(_INT, length), list(range(length))))


def _bits(builder: Any, row: Any, where: Bits, length: int) -> Any:
    """Return `length` bits in order, one a lane."""
    byte, before = divmod(where.bit, 8)
    word = ir.IntType(8 * -(-(before + length) // 8))
    bits = builder.load(builder.bitcast(builder.gep(row, [_LONG(byte)]), word.as_pointer()), align=1)
    if before:
        bits = builder.lshr(bits, word(before))
    if word.width > length:
        bits = builder.trunc(bits, ir.IntType(length))
    return builder.bitcast(bits, _vector(ir.IntType(1), length))


def _gathered(builder: Any, codes: Any, table: Any) -> Any:
    length = codes.type.count
    base = builder.ptrtoint(table, _LONG)
    wide = builder.zext(codes, _vector(_LONG, length))
    empty = ir.Constant(wide.type, ir.Undefined)
    start = builder.shuffle_vector(builder.insert_element(empty, base, _INT(0)), empty, _constant(0, length))
    places = builder.add(start, builder.shl(wide, _constant(2, length, _LONG)))
    pointers = builder.inttoptr(places, _vector(_FLOAT.as_pointer(), length))
    result = _vector(_FLOAT, length)
    name = f"llvm.masked.gather.v{length}f32.v{length}p0"
    mask = ir.Constant(_vector(ir.IntType(1), length), [1] * length)
    return _call(builder, name, result, [pointers, _INT(4), mask, ir.Constant(result, ir.Undefined)])


def _sum(builder: Any, vector: Any) -> Any:
    """Return the sum of a vector's numbers, by halves."""
    length = vector.type.count
    while length > 1:
        length //= 2
        low, high = (
            builder.shuffle_vector(
                vector, vector, ir.Constant(_vector(_INT, length), list(range(first, first + length)))
            )
            for first in (0, length)
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, _INT(0))


def _sums(builder: Any, vectors: list[Any]) -> list[Any]:
    """Return the sum of each vector's numbers.

    Where there are at least as many vectors as a power of two, pairs are folded into one another, which takes a third
    of the instructions of summing one by one.
    """
    length = vectors[0].type.count
    count = len(vectors)
    if count & (count - 1) or count > length:
        return [_sum(builder, vector) for vector in vectors]
    lanes = count
    while len(vectors) > 1:
        vectors = [_folded(builder, *pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    (vector,) = vectors
    # Each vector has length / count neighbouring lanes left.
    left = length // lanes
    while left > 1:
        left //= 2
        low, high = (
            [lane * 2 * left + half + offset for lane in range(lanes) for offset in range(left)] for half in (0, left)
        )
        picked = (
            builder.shuffle_vector(vector, vector, ir.Constant(_vector(_INT, len(pick)), pick)) for pick in (low, high)
        )
        vector = builder.fadd(*picked)
    return [builder.extract_element(vector, _INT(lane)) for lane in range(lanes)]


def _folded(builder: Any, one: Any, other: Any) -> Any:
    """Return a vector with the sums of neighbours of `one` in its front half and those of `other` behind."""
    length = one.type.count
    even, odd = ([first + 2 * index for index in range(length)] for first in (0, 1))
    parts = [builder.shuffle_vector(one, other, ir.Constant(_vector(_INT, length), pick)) for pick in (even, odd)]
    return builder.fadd(*parts)


# ------------------------------------------------------------------------------------------------ for numba


def _literals(*kinds: Any) -> list[int]:
    return [kind.literal_value for kind in kinds]


@intrinsic(prefer_literal=True)
def pointer_to(_context: Any, address: Any, kind: Any) -> Any:
    """Return the integer `address` as a pointer; `kind`: uint8, float32, uint16, int64, int32 from 0 on."""
    pointee = (types.uint8, types.float32, types.uint16, types.int64, types.int32)[kind.literal_value]
    pointer = types.CPointer(pointee)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, kind), generate


@intrinsic
def next_share(_context: Any, counter: Any) -> Any:
    """Raise the int64 that `counter` points to by one, and return what it was; no two threads get the same."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], _LONG(1), "monotonic")

    return types.int64(counter), generate


@intrinsic
def half_to_float(_context: Any, bits: Any) -> Any:
    """Return the float16 with these bits, a uint16, as float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], _HALF), _FLOAT)

    return types.float32(types.uint16), generate


@intrinsic
def byte_to_scale(_context: Any, stored: Any) -> Any:
    """Return the scale that a uint8 stands for (see `kvquant.engine.scales`) as float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.shl(builder.zext(arguments[0], _INT), _INT(20))
        return builder.bitcast(builder.add(bits, _INT((127 + LOWEST_EXPONENT) << 23)), _FLOAT)

    return types.float32(types.uint8), generate


@intrinsic(prefer_literal=True)
def dot_rows(
    _context: Any,
    codes: Any,
    row_bytes: Any,
    tokens: Any,
    query: Any,
    table: Any,
    out: Any,
    width: Any,
    half_bits: Any,
    group: Any,
    rows: Any,
    entries: Any,
    room: Any,
) -> Any:
    """Write ``out[g, r, t] = sum(number[t, d] * query[r, d] for d in group g)``.

    Args:
        codes: uint8 pointer to the first row; rows are `row_bytes` apart, and there are `tokens`.
        query: float32 pointer ``[rows, width]``.
        table: float32 pointer to `entries` numbers, at least `LANES`; a code is its own number where `entries` is 0.
            For a mixed width, to `HALF_TABLE` numbers for each half, and `entries` is `HALF_TABLE`.
        out: float32 pointer ``[width / group, rows, room]``.
        width, half_bits (of a code, counted in halves), group, rows, entries, room: literal integers.
    """
    columns, bits, per, count, named, stride = _literals(width, half_bits, group, rows, entries, room)
    floats, byte_pointer = types.CPointer(types.float32), types.CPointer(types.uint8)
    signature = types.void(
        byte_pointer, types.int64, types.int64, floats, floats, floats, width, half_bits, group, rows, entries, room
    )

    def block(builder: Any, arguments: Any, first: Any, unroll: int) -> None:
        packed, apart, _, queries, entry, target = arguments[:6]
        starts = [builder.gep(packed, [builder.mul(builder.add(first, _LONG(u)), apart)]) for u in range(unroll)]
        sums: dict[tuple[int, int, int, int], Any] = {}
        for run in runs(columns, bits / 2, per):
            numbers = [_numbers(builder, start, run, entry, named) for start in starts]
            for r in range(count):
                factor = _load(builder, builder.gep(queries, [_LONG(r * columns + run.start)]), _FLOAT, run.length, 4)
                for u, number in enumerate(numbers):
                    key = (run.start // per, run.length, u, r)
                    old = sums.get(key)
                    sums[key] = builder.fmul(number, factor) if old is None else _fused(builder, number, factor, old)
        totals: dict[tuple[int, int, int], Any] = {}
        for g, length in dict.fromkeys(key[:2] for key in sums):
            keys = [(u, r) for u in range(unroll) for r in range(count)]
            for (u, r), total in zip(keys, _sums(builder, [sums[g, length, *key] for key in keys]), strict=True):
                held = totals.get((g, u, r))
                totals[g, u, r] = total if held is None else builder.fadd(held, total)
        for (g, u, r), total in totals.items():
            place = builder.add(builder.add(first, _LONG(u)), _LONG((g * count + r) * stride))
            builder.store(total, builder.gep(target, [place]))

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        whole = builder.mul(builder.sdiv(arguments[2], _LONG(UNROLL)), _LONG(UNROLL))
        with cgutils.for_range_slice(builder, _LONG(0), whole, _LONG(UNROLL), inc=True) as (first, _):
            block(builder, arguments, first, UNROLL)
        with cgutils.for_range_slice(builder, whole, arguments[2], _LONG(1), inc=True) as (first, _):
            block(builder, arguments, first, 1)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def mix_rows(
    _context: Any,
    codes: Any,
    row_bytes: Any,
    tokens: Any,
    weights: Any,
    table: Any,
    out: Any,
    width: Any,
    half_bits: Any,
    group: Any,
    rows: Any,
    entries: Any,
    room: Any,
) -> Any:
    """Write ``out[r, d] = sum(weights[g, r, t] * number[t, d] for t in tokens)``, where channel d is in group g.

    Args:
        codes, row_bytes, tokens, table, entries: as for `dot_rows`.
        weights: float32 pointer ``[width / group, rows, room]``.
        out: float32 pointer ``[rows, width]``.
        width, half_bits, group, rows, room: literal integers, as there.
    """
    columns, bits, per, count, named, stride = _literals(width, half_bits, group, rows, entries, room)
    floats, byte_pointer = types.CPointer(types.float32), types.CPointer(types.uint8)
    signature = types.void(
        byte_pointer, types.int64, types.int64, floats, floats, floats, width, half_bits, group, rows, entries, room
    )

    def batch(builder: Any, arguments: Any, together: list[Run]) -> None:
        packed, apart, number_of, factors, entry, target = arguments[:6]
        sums = [
            [cgutils.alloca_once_value(builder, _constant(0.0, run.length, _FLOAT)) for _ in range(count)]
            for run in together
        ]
        for run, places in zip(together, sums, strict=True):
            for place in places:
                builder.store(_constant(0.0, run.length, _FLOAT), place)
        with cgutils.for_range(builder, number_of) as loop:
            row = builder.gep(packed, [builder.mul(loop.index, apart)])
            scalars: dict[tuple[int, int, int], Any] = {}
            for run, places in zip(together, sums, strict=True):
                number = _numbers(builder, row, run, entry, named)
                for r, place in enumerate(places):
                    key = (run.start // per, r, run.length)
                    if key not in scalars:
                        at = builder.add(loop.index, _LONG((key[0] * count + r) * stride))
                        scalars[key] = _splat(builder, builder.load(builder.gep(factors, [at])), run.length)
                    builder.store(_fused(builder, number, scalars[key], builder.load(place)), place)
        for run, places in zip(together, sums, strict=True):
            for r, place in enumerate(places):
                where = builder.gep(target, [_LONG(r * columns + run.start)])
                pointer = builder.bitcast(where, _vector(_FLOAT, run.length).as_pointer())
                builder.store(builder.load(place), pointer, align=4)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        found = runs(columns, bits / 2, per)
        step = max(1, _SUMS // count)
        for first in range(0, len(found), step):
            batch(builder, arguments, found[first : first + step])
        return context.get_dummy_value()

    return signature, generate

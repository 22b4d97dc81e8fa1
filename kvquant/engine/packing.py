"""Codes of 1, 2, 3, 4 or 8 bits, and of mixed widths between them, packed into bytes without waste.

Layout of one row of ``n`` codes, ``n`` rounded up to a multiple of 8. Widths 1, 2 and 4 are *planar*: with
``m = n * nbits / 8`` bytes, byte ``j`` holds codes ``j``, ``j + m``, ``j + 2m``, ... from its low bits up. So a shift
and a mask of the whole row give a contiguous run of codes, with no interleaving, in torch, SIMD and Triton alike. Three
bits are a plane of the low 2 bits followed by a plane of the high bit: really 3 bits a code.

In a row of 1.5, 2.5 or 3.5 bits the first half of the codes (``n // 2``) has the width above and the second half the
width below. It is a row of the width below, followed by the highest bits of the first half *in order*: that of code
``j`` is bit ``j % 8`` of byte ``j // 8``, so that a vector of them is one load into a mask register.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Bits of a code; half a bit more is the width above for one half of the codes.
WIDTHS: tuple[float, ...] = (1, 1.5, 2, 2.5, 3, 3.5, 4, 8)


def widths_of(nbits: float) -> tuple[int, ...]:
    """Return the width of all codes of a row, or that of the first half and that of the second: (3, 2) for 2.5."""
    lower = int(nbits)
    return (lower,) if nbits == lower else (lower + 1, lower)


def table_sizes(nbits: float, taps: object = None) -> tuple[int, ...]:
    """Return the entries of a table, or of the two of a mixed width, which lie one behind the other.

    With the `taps` of a trellis a table has twice as many as codes could name by themselves.
    """
    return tuple(2 ** (width + (taps is not None)) for width in widths_of(nbits))


def packed_bytes(n: int, nbits: float) -> int:
    """Return the bytes that a row of `n` codes of `nbits` bits takes."""
    lower = int(nbits)
    return -(-n // 8) * lower + (0 if nbits == lower else -(-(n // 2) // 8))


def pack(codes: Tensor, nbits: float) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: uint8 ``[..., n]``, each below ``2**nbits``; of a mixed width, below 2 to the power of its half's width.
        nbits: one of `WIDTHS`.

    Returns:
        uint8 ``[..., packed_bytes(n, nbits)]``, contiguous.
    """
    n, lower = codes.shape[-1], int(nbits)
    if nbits != lower:
        first = codes[..., : n // 2]
        return torch.cat([pack(codes & (2**lower - 1), lower), _pack_in_order(first >> lower)], dim=-1)
    if n % 8:
        codes = torch.nn.functional.pad(codes, (0, 8 - n % 8))
    if nbits == 8:
        return codes.contiguous()
    if nbits == 3:
        return torch.cat([_pack_planar(codes & 3, 2), _pack_planar(codes >> 2, 1)], dim=-1)
    return _pack_planar(codes, lower)


def unpack(packed: Tensor, nbits: float, n: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: uint8 ``[..., packed_bytes(n, nbits)]``.
        nbits: one of `WIDTHS`.
        n: codes in a row.

    Returns:
        uint8 ``[..., n]``.
    """
    lower = int(nbits)
    if nbits != lower:
        whole = packed_bytes(n, lower)
        codes = unpack(packed[..., :whole], lower, n)
        codes[..., : n // 2] |= _unpack_in_order(packed[..., whole:])[..., : n // 2] << lower
    elif nbits == 8:
        codes = packed
    elif nbits == 3:
        low_bytes = packed.shape[-1] * 2 // 3
        low, high = packed[..., :low_bytes], packed[..., low_bytes:]
        codes = _unpack_planar(low, 2) | (_unpack_planar(high, 1) << 2)
    else:
        codes = _unpack_planar(packed, lower)
    return codes[..., :n]


def _pack_planar(codes: Tensor, width: int) -> Tensor:
    planes: Tensor = codes.unflatten(-1, (8 // width, -1))
    packed = planes[..., 0, :].clone(memory_format=torch.contiguous_format)
    for plane in range(1, 8 // width):
        packed |= planes[..., plane, :] << plane * width
    return packed


def _unpack_planar(packed: Tensor, width: int) -> Tensor:
    mask = 2**width - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, width)], dim=-1)


def _pack_in_order(bits: Tensor) -> Tensor:
    # Bits in order are a planar row of one bit laid out the other way round.
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    return _pack_planar(padded.unflatten(-1, (-1, 8)).transpose(-1, -2).flatten(-2), 1)


def _unpack_in_order(packed: Tensor) -> Tensor:
    planes: Tensor = _unpack_planar(packed, 1).unflatten(-1, (8, -1))
    return planes.transpose(-1, -2).flatten(-2)

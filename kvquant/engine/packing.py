"""Codes of 1, 2, 3, 4 or 8 bits, packed into bytes without waste.

Layout of one row of ``n`` codes, ``n`` rounded up to a multiple of 8. Widths 1, 2 and 4 are *planar*: with
``m = n * nbits / 8`` bytes, byte ``j`` holds codes ``j``, ``j + m``, ``j + 2m``, ... from its low bits up. So a shift
and a mask of the whole row give a contiguous run of codes, with no interleaving, in torch, SIMD and Triton alike. Three
bits are a plane of the low 2 bits followed by a plane of the high bit: really 3 bits a code.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (1, 2, 3, 4, 8)


def packed_bytes(n: int, nbits: int) -> int:
    """Return the bytes that a row of `n` codes of `nbits` bits takes."""
    return -(-n // 8) * nbits


def pack(codes: Tensor, nbits: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: uint8 ``[..., n]``, each below ``2**nbits``.
        nbits: 1, 2, 3, 4 or 8.

    Returns:
        uint8 ``[..., packed_bytes(n, nbits)]``, contiguous.
    """
    n = codes.shape[-1]
    if n % 8:
        codes = torch.nn.functional.pad(codes, (0, 8 - n % 8))
    if nbits == 8:
        return codes.contiguous()
    if nbits == 3:
        return torch.cat([_pack_planar(codes & 3, 2), _pack_planar(codes >> 2, 1)], dim=-1)
    return _pack_planar(codes, nbits)


def unpack(packed: Tensor, nbits: int, n: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: uint8 ``[..., packed_bytes(n, nbits)]``.
        nbits: 1, 2, 3, 4 or 8.
        n: codes in a row.

    Returns:
        uint8 ``[..., n]``.
    """
    if nbits == 8:
        codes = packed
    elif nbits == 3:
        low_bytes = packed.shape[-1] * 2 // 3
        low, high = packed[..., :low_bytes], packed[..., low_bytes:]
        codes = _unpack_planar(low, 2) | (_unpack_planar(high, 1) << 2)
    else:
        codes = _unpack_planar(packed, nbits)
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

"""How scales and offsets are stored: in 8, 16 or 32 bits, and in 64 for caches that compute in float64.

In 16 and 32 bits they are floating numbers. In 8 bits a scale is an unsigned floating number with 5 bits of exponent
and 3 of fraction, 2**-20 to 3840, and an offset says where the middle of the levels lies, in 32nds of their range.
Groups of 32 numbers then pay half a bit each for both, and groups of 64 a quarter. Steps of 6 % in a scale cost next
to nothing, because the codes are chosen after it: each number takes the nearest of the levels that there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant.plugin.quantizer import QuantizedRows

#: What an exponent field of zero stands for, and the largest scale.
LOWEST_EXPONENT, LARGEST = -20, 3840.0
#: Parts of the range of all levels in which the place of their middle is given, and the part that stands for zero.
PARTS, CENTER = 32, 128
#: What stands for the range of the levels of a table, in scales: tables are for numbers of about unit size.
TABLE_SPAN = 4.0
#: How far from zero the middle may lie, in ranges; 127 parts are the most, and the scale may be rounded down.
_REACH = 3.7
#: How many times larger than the backend's a scale may be, so that its levels reach the middle.
_STRETCH = 1.1


@dataclass(frozen=True)
class Levels:
    """The levels that codes stand for, with scale 1: what an offset in 8 bits is relative to.

    Attributes:
        span: the range that `PARTS` parts make.
        middle: where the middle of the levels lies without an offset.
    """

    span: float
    middle: float

    @classmethod
    def of(cls, nbits: float, table: Tensor | None) -> Levels:
        """Return those of codes of `nbits` bits, which are their own numbers where there is no table."""
        if table is not None:
            return cls(span=TABLE_SPAN, middle=0.0)
        count = 2 ** math.ceil(nbits)
        return cls(span=float(count), middle=(count - 1) / 2)


def read_scale(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Return stored scales as numbers."""
    if stored.dtype != torch.uint8:
        return stored.to(dtype)
    # A byte in front of the fraction of a float32: its exponent is counted from 127.
    bits = (stored.to(torch.int32) << 20) + ((127 + LOWEST_EXPONENT) << 23)
    return bits.view(torch.float32).to(dtype)


def read_offset(stored: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """Return stored offsets as numbers, in the type of `scale`, the scales as `read_scale` returns them."""
    if stored.dtype != torch.uint8:
        return stored.to(scale.dtype)
    return (stored.to(scale.dtype) - CENTER).mul_(levels.span / PARTS).sub_(levels.middle).mul_(scale)


def to_bytes(
    rows: QuantizedRows, numbers: Tensor, nbits: int, levels: Levels | None = None
) -> tuple[QuantizedRows, Tensor]:
    """Return rows with scales and offsets in 8 bits, and codes chosen anew for them; and which rows fit.

    A row whose levels lie many ranges away from zero would need a larger scale to say where; it does not fit, unless it
    is constant, and comes back within half a percent. Nor does one whose scale is too large or too small. Codes of a
    trellis depend on one another and stay.

    Args:
        rows: with scales and offsets in the type of `numbers`.
        numbers: floating ``[n_groups, group_size]``, what they stand for; written over.
        nbits: bits of a code.
        levels: what offsets are relative to, where it is not the levels of these codes: those of a half of the channels
            that has a bit more.

    Returns:
        The rows, and bool ``[n_groups]``: which of them lose nothing that matters.
    """
    own, scale, offset = Levels.of(nbits, rows.table), rows.scale, rows.offset
    levels = levels or own
    aside = levels.middle - own.middle  # in scales: from the middle of these codes' levels to that of `levels`
    size = scale.abs()
    middle = scale * own.middle if offset is None else offset + scale * own.middle
    needed = size if offset is None else torch.maximum(size, middle.abs() / (levels.span * _REACH - aside))
    stored = _nearest_byte(needed)
    taken = read_scale(stored, scale.dtype)
    fits = (scale >= 0) & (needed <= LARGEST) & ((size == 0) | (taken <= size * _STRETCH))
    place = None
    if offset is not None:
        if rows.table is None:
            # There is no level in the middle of an even number of them; a constant row is to lie on one.
            middle = torch.where(size > 0, middle, middle - middle.sign() * taken / 2)
        parts = ((middle / taken + aside) / levels.span * PARTS).round_().add_(CENTER).clamp_(0, 255)
        place = parts.to(torch.uint8)
        numbers = numbers.sub_(read_offset(place, taken, levels)[:, None])
    codes = rows.codes if rows.taps else _nearest_codes(numbers.div_(taken[:, None]), rows.table, nbits)
    return QuantizedRows(codes, stored, place, rows.table, rows.taps), fits


def _nearest_codes(units: Tensor, table: Tensor | None, nbits: int) -> Tensor:
    """Return the codes of the levels that are nearest to numbers ``[n_groups, group_size]``, which are written over."""
    if table is None:
        # torch converts float to uint8 without vector instructions, and to int16 with them.
        return units.round_().clamp_(0, 2**nbits - 1).to(torch.int16).to(torch.uint8)
    levels, order = table.sort()
    return order[torch.bucketize(units, (levels[1:] + levels[:-1]) / 2)].to(torch.uint8)


def _nearest_byte(scale: Tensor) -> Tensor:
    """Return the byte whose number is nearest to each of these, none below zero."""
    fraction, exponent = torch.frexp(scale.clamp(2.0**LOWEST_EXPONENT, LARGEST))
    # A fraction is from 1/2 to 1 here, and its rounding may lead to the next exponent, which is the next byte too.
    steps = (fraction * 16 - 8).round_() + (exponent - 1 - LOWEST_EXPONENT) * 8
    return steps.clamp_(0, 255).to(torch.uint8)

"""What is done to a query's scores of one block of tokens: capped, masked, made exponentials of. Inlined by numba."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit

from kvquant.attention.numba_pages import BLOCK, KEPT, OUTLIER, OUTLIER_BATCH, OUTLIER_HEAD
from kvquant.attention.simd import pointer_to

#: What a mask is to the kernel: addresses (0: there is none) and strides of an additive mask and of one of bytes, and
#: the query tokens of a group.
MASK = "bias b_batch b_head b_group b_query b_token seen s_batch s_head s_group s_query s_token queries".split()

#: A score so low that it cannot be told from minus infinity, which would forbid fast arithmetic.
LOWEST = np.float32(np.finfo(np.float32).min)

_LOG2_E = np.float32(math.log2(math.e))
_SERIES = tuple(np.float32(math.log(2) ** n / math.factorial(n)) for n in range(8))


@njit(nogil=True, inline="always")
def add_mask(scores: Any, mask: Any, batch: Any, head: Any, row: Any, start: Any, count: Any) -> None:
    """Add the additive mask of tokens `start` to `start + count`."""
    at = batch * mask[1] + head * mask[2] + row // mask[12] * mask[3] + row % mask[12] * mask[4] + start * mask[5]
    numbers = carray(pointer_to(mask[0] + 4 * at, 1), (1 + count * mask[5],))
    for t in range(count):
        scores[t] = max(scores[t] + numbers[t * mask[5]], LOWEST)


@njit(nogil=True, inline="always")
def hide(scores: Any, mask: Any, batch: Any, head: Any, row: Any, start: Any, count: Any, hidden: Any) -> None:
    """Put `hidden` in place of what belongs to tokens that may not be seen."""
    at = batch * mask[7] + head * mask[8] + row // mask[12] * mask[9] + row % mask[12] * mask[10] + start * mask[11]
    seen = carray(pointer_to(mask[6] + at, 0), (1 + count * mask[11],))
    for t in range(count):
        if seen[t * mask[11]] == 0:
            scores[t] = hidden


@njit(nogil=True, fastmath=True, inline="always")
def exponentials(x: Any, count: Any, bits: Any, powers: Any) -> None:
    """Replace the first `count` numbers of `x`, none above zero, by their exponentials.

    ``e**x = 2**k * 2**f`` with k the integer nearest to ``x * log2(e)`` and f from -1/2 to 1/2, where the first eight
    terms of the series of ``2**f`` are exact to 5e-9.
    """
    for index in range(count):
        power = max(x[index] * _LOG2_E, np.float32(-126.0))
        whole = np.floor(power + np.float32(0.5))
        part = power - whole
        value = _SERIES[7]
        value = value * part + _SERIES[6]
        value = value * part + _SERIES[5]
        value = value * part + _SERIES[4]
        value = value * part + _SERIES[3]
        value = value * part + _SERIES[2]
        value = value * part + _SERIES[1]
        x[index] = value * part + _SERIES[0]
        bits[index] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    for index in range(count):
        x[index] *= powers[index]


@njit(nogil=True, fastmath=True, inline="always")
def soften(scores: Any, count: Any, shift: Any, cap: Any, falling: Any, bits: Any, powers: Any) -> None:
    """Replace scores by ``cap * tanh(x / cap)``, where x is a score and `shift`.

    With ``e = exp(-2 |x| / cap)`` it is ``cap * (1 - e) / (1 + e)``.
    Near zero ``1 - e`` is exact to the rounding of 1, which is that of a score of the size of `cap`.
    """
    twice = np.float32(-2) / cap
    for t in range(count):
        scores[t] += shift
        falling[t] = max(abs(scores[t]) * twice, LOWEST)
    exponentials(falling, count, bits, powers)
    for t in range(count):
        size = cap * (np.float32(1) - falling[t]) / (np.float32(1) + falling[t])
        scores[t] = size if scores[t] > 0 else -size


@njit(nogil=True, inline="always")
def leave_out(scores: Any, page: Any, batch: Any, head: Any, position: Any, count: Any, value: Any) -> None:
    """Set the scores of a page's outlier tokens, among `count` tokens from its token `position` on."""
    kept, size = page[KEPT], page[BLOCK]
    if kept != 0:
        first = batch * page[OUTLIER_BATCH] + head * page[OUTLIER_HEAD]
        for block in range(position // size, (position + count - 1) // size + 1):
            places = carray(pointer_to(page[OUTLIER] + 4 * (first + block * kept), 4), (kept,))
            for index in range(kept):
                token = block * size + places[index] - position
                if 0 <= token < count:
                    scores[token] = value

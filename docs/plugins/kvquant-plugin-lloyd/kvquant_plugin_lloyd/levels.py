"""The levels with the smallest squared error for normal numbers, found by Lloyd's iteration.

In a quantiser of least squares every boundary lies midway between two levels, and every level is the mean of its cell::

    boundary = (level + next level) / 2      level = (pdf(low) - pdf(high)) / (cdf(high) - cdf(low))

Lloyd's method I sets one and then the other until nothing moves: Lloyd 1982, "Least squares quantization in PCM",
https://doi.org/10.1109/TIT.1982.1056489; for the normal distribution Max 1960, "Quantizing for minimum distortion",
https://doi.org/10.1109/TIT.1960.1057548.
"""

import math
from functools import cache
from itertools import pairwise

#: Where the iteration stops: no level moved by more than this.
_TOLERANCE = 1e-12


@cache
def normal_levels(nbits: int) -> tuple[float, ...]:
    """Return the ``2**nbits`` optimal levels for numbers with mean 0 and variance 1, in order.

    Args:
        nbits: 1 or more. Each bit more takes about five times as long; 4 take milliseconds.
    """
    count = 2 ** (nbits - 1)  # the levels above zero; those below mirror them
    levels, moved = [3 * (index + 0.5) / count for index in range(count)], math.inf
    while moved > _TOLERANCE:
        means = [_mean(low, high) for low, high in pairwise(_boundaries(levels))]
        moved = max(abs(mean - level) for mean, level in zip(means, levels, strict=True))
        levels = means
    return (*(-level for level in reversed(levels)), *levels)


def distortion(nbits: int) -> float:
    """Return the mean squared error that these levels leave, as a share of the variance.

    It is the variance that the levels do not explain: every level being its cell's mean, ``1 - sum(share * level**2)``.
    """
    above = list(normal_levels(nbits)[2 ** (nbits - 1) :])
    cells = zip(pairwise(_boundaries(above)), above, strict=True)
    return 1 - sum(2 * (_cdf(high) - _cdf(low)) * level**2 for (low, high), level in cells)


def _boundaries(levels: list[float]) -> list[float]:
    """Return the ends of the cells of the levels above zero."""
    return [0.0, *((one + other) / 2 for one, other in pairwise(levels)), math.inf]


def _mean(low: float, high: float) -> float:
    return (_pdf(low) - _pdf(high)) / (_cdf(high) - _cdf(low))


def _pdf(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _cdf(x: float) -> float:
    """Return the share of numbers from 0 to `x`."""
    return math.erf(x / math.sqrt(2)) / 2

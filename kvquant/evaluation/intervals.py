"""How sure a mean over a few windows, or a few questions, is: bootstrap confidence intervals.

Windows are drawn again with replacement, whole, because tokens of one window share a history and are no independent
samples. Figures of two caches on the same windows are drawn together, so that what is hard for both cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from kvquant.errors import MissingExtraError

FloatArray = npt.NDArray[np.float64]
#: Figures of windows ``[..., windows]``, one array for each cache -> the figure ``[...]`` that an interval is for.
Statistic = Callable[..., Any]

#: Share of intervals that hold the true value, as far as the method goes.
CONFIDENCE = 0.95
_RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """A figure and its confidence interval; `low` and `high` are None where one window says nothing of others."""

    value: float
    low: float | None = None
    high: float | None = None


def require_scipy() -> None:
    """Raise before long work what a bootstrap would raise after it.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    if find_spec("scipy") is None:
        raise MissingExtraError("scipy", "pip install 'kvquant[eval]'")


def estimate(statistic: Statistic, *samples: Sequence[float], seed: int = 0, paired: bool = True) -> Estimate:
    """Return a figure of samples with its interval.

    The interval is the bias-corrected and accelerated bootstrap (Efron, "Better bootstrap confidence intervals", 1987)
    of `scipy.stats.bootstrap`, and where that is not defined the percentile bootstrap.

    Args:
        statistic: what is wanted, of arrays ``[..., windows]`` along their last axis.
        samples: a figure for each window, of one or more caches, all of one length.
        seed: of the draws.
        paired: draw the same windows in all samples. Otherwise each is drawn by itself, and their lengths may differ:
            samples of unlike things, such as tasks, whose shares in the whole are no accident.
    """
    data = [np.asarray(sample, dtype=np.float64) for sample in samples]
    value = float(statistic(*data, axis=-1))
    if min(map(len, data)) < 2:
        return Estimate(value)
    if all(np.ptp(sample) == 0 for sample in data):
        return Estimate(value, value, value)
    for method in ("BCa", "percentile"):
        low, high = _interval(statistic, data, method, seed, paired=paired)
        if np.isfinite(low) and np.isfinite(high):
            return Estimate(value, low, high)
    return Estimate(value)


def proportion(successes: int, trials: int) -> Estimate:
    """Return a share of trials with its interval: Wilson's score interval, which holds near 0 and 1 too.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927; it is
    `scipy.stats.binomtest`'s.

    Args:
        successes: trials that succeeded.
        trials: all trials, at least 1.
    """
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return Estimate(successes / trials, float(found.low), float(found.high))


def _interval(
    statistic: Statistic, data: list[FloatArray], method: str, seed: int, *, paired: bool
) -> tuple[float, float]:
    import warnings

    from scipy.stats import bootstrap

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of samples so alike that the method is not defined: the caller looks
        found = bootstrap(
            data,
            statistic,
            paired=paired,
            vectorized=True,
            n_resamples=_RESAMPLES,
            batch=1000,
            confidence_level=CONFIDENCE,
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(found.low), float(found.high)


def mean(sample: FloatArray, axis: int = -1) -> Any:
    """Return the mean."""
    return sample.mean(axis=axis)


def mean_of_means(*samples: FloatArray, axis: int = -1) -> Any:
    """Return the mean of the means of samples, each of which counts alike."""
    return sum(sample.mean(axis=axis) for sample in samples) / len(samples)


def ratio_of_means(sample: FloatArray, base: FloatArray, axis: int = -1) -> Any:
    """Return the mean of one sample over that of another."""
    return sample.mean(axis=axis) / base.mean(axis=axis)


def perplexity(nll: FloatArray, axis: int = -1) -> Any:
    """Return ``exp(mean negative log-likelihood)``."""
    return np.exp(nll.mean(axis=axis))


def perplexity_difference(nll: FloatArray, base: FloatArray, axis: int = -1) -> Any:
    """Return the perplexity of one sample less that of another."""
    return perplexity(nll, axis) - perplexity(base, axis)


def perplexity_change(nll: FloatArray, base: FloatArray, axis: int = -1) -> Any:
    """Return the perplexity of one sample over that of another, less 1."""
    return np.expm1((nll - base).mean(axis=axis))

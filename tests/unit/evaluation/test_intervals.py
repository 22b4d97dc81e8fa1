"""Bootstrap intervals."""

import importlib.util

import numpy as np
import pytest

from kvquant.errors import MissingExtraError
from kvquant.evaluation import intervals
from kvquant.evaluation.intervals import Estimate, estimate


def test_known_statistics():
    """Each by its definition."""
    nll, base = np.array([2.0, 4.0]), np.array([1.0, 3.0])
    assert intervals.perplexity(nll) == pytest.approx(np.exp(3))
    assert intervals.perplexity_difference(nll, base) == pytest.approx(np.exp(3) - np.exp(2))
    assert intervals.perplexity_change(nll, base) == pytest.approx(np.e - 1)
    assert intervals.ratio_of_means(nll, base) == 1.5
    assert intervals.mean(nll) == 3


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 200 samples of 30 with mean 1, about 95 % of the intervals hold it."""
    draws = np.random.default_rng(0).gamma(4, 0.25, (200, 30))
    found = [estimate(intervals.mean, sample) for sample in draws]
    held = np.mean([one.low <= 1 <= one.high for one in found])
    assert 0.9 <= held <= 0.99


def test_pairs_are_drawn_together():
    """What both have in common cancels out: windows differ by 10, the caches by 0.01 on each."""
    base = np.linspace(0, 10, 12)
    noise = np.random.default_rng(0).normal(0.01, 0.001, 12)
    paired = estimate(intervals.perplexity_change, base + noise, base)
    assert 0.009 < paired.low < paired.value < paired.high < 0.011


def test_the_same_seed_gives_the_same_interval():
    """And another seed another."""
    sample = np.random.default_rng(1).normal(size=20)
    assert estimate(intervals.mean, sample, seed=3) == estimate(intervals.mean, sample, seed=3)
    assert estimate(intervals.mean, sample, seed=3) != estimate(intervals.mean, sample, seed=4)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [([2.0], Estimate(2.0)), ([1.0, 1.0, 1.0], Estimate(1.0, 1.0, 1.0))],
)
def test_where_nothing_can_be_said(sample, expected):
    """One window has no interval; windows that agree have one of no width."""
    assert estimate(intervals.mean, sample) == expected


def test_samples_that_are_nearly_all_alike_have_an_interval():
    """The better method is not defined there, the simpler one is."""
    found = estimate(intervals.mean, [1.0] * 11 + [0.9])
    assert found.low <= found.value <= found.high <= 1


def test_without_scipy_the_message_says_what_to_install(monkeypatch):
    """Before work begins."""
    found = importlib.util.find_spec
    monkeypatch.setattr(intervals, "find_spec", lambda name: None if name == "scipy" else found(name))
    with pytest.raises(MissingExtraError, match=r"this needs scipy, .* pip install 'kvquant\[eval\]'"):
        intervals.require_scipy()

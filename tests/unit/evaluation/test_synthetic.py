"""The states that backends are compared on."""

from __future__ import annotations

import pytest
import torch

from kvquant.evaluation.synthetic import STATES, gaussian_states, outlier_states


@pytest.mark.parametrize("kind", STATES)
def test_states_are_the_same_for_the_same_seed(kind: str) -> None:
    """So that errors can be compared between runs; of the shape that caches take."""
    make = STATES[kind]
    assert make(2, 64, 32, 0).shape == (1, 2, 64, 32)
    assert torch.equal(make(2, 64, 32, 0), make(2, 64, 32, 0))
    assert not torch.equal(make(2, 64, 32, 0), make(2, 64, 32, 1))


def test_gaussian_states_are_unit_normal() -> None:
    """A mean of 0 and a deviation of 1."""
    states = gaussian_states(4, 1024, 64, 0)
    assert abs(float(states.mean())) < 0.01
    assert abs(float(states.std()) - 1) < 0.01


def test_outlier_channels_are_few_large_and_the_same_for_all_tokens() -> None:
    """One in sixteen, with a deviation of 10 to 20 and a mean as large; elsewhere in each head."""
    states = outlier_states(3, 4096, 64, 0)[0]
    large = states.std(dim=1) > 5
    assert (large.sum(dim=1) == 4).all()
    assert not (large[0] & large[1] & large[2]).any()
    deviation, mean = states.std(dim=1)[large], states.mean(dim=1)[large]
    assert ((deviation > 9.5) & (deviation < 21)).all()
    assert (mean.abs() / deviation - 1).abs().max() < 0.1
    assert mean.min() < 0 < mean.max()
    assert (states.std(dim=1)[~large] - 1).abs().max() < 0.1
    assert states.mean(dim=1)[~large].abs().max() < 0.1


def test_few_channels_still_have_an_outlier() -> None:
    """One at least."""
    assert (outlier_states(1, 256, 8, 0)[0].std(dim=1) > 5).sum() == 1

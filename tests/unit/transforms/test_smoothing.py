"""Smoothing: channels are centred and outliers scaled down, and nothing of that shows in what is read or attended."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.errors import OptionValueError
from kvquant.registry import get_transform
from kvquant.transforms.frame import Frame
from kvquant.transforms.heads import head_transform
from kvquant.transforms.smoothing import OUTLIER, Smoothing


def hard(tokens: int = 300, batch: int = 2) -> torch.Tensor:
    """States whose channels lie far from zero, one of them with forty times the spread."""
    states = torch.randn(batch, 2, tokens, 16) + 5 * torch.randn(batch, 2, 1, 16)
    states[..., 3] *= 40
    return states


def test_channels_are_centred_and_outliers_brought_to_twice_the_typical_spread() -> None:
    """To what float16 holds of the statistics; channels that are not outliers keep their spread."""
    states = hard()
    smooth = Smoothing.fit(states).apply(states)
    deviation = smooth.std(2, unbiased=False)
    assert smooth.mean(2).abs().max() < 0.03
    torch.testing.assert_close(deviation[..., 3], OUTLIER * deviation.median(2).values, rtol=2e-3, atol=0)
    others = torch.arange(16) != 3
    torch.testing.assert_close(deviation[..., others], states.std(2, unbiased=False)[..., others], rtol=1e-4, atol=0)


@given(st.integers(0, 2**16), st.sampled_from([torch.float32, torch.float64]))
def test_it_can_be_undone(seed: int, dtype: torch.dtype) -> None:
    """Whatever the states, constant channels and huge ones among them."""
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(1, 2, 9, 8, generator=draw) * 10.0 ** torch.randint(-6, 7, (1, 2, 1, 8), generator=draw)
    states[..., 0] = 7
    states = states.to(dtype)
    smoothing = Smoothing.fit(states)
    read = smoothing.undo(smoothing.apply(states))
    size = states.abs().amax(2, keepdim=True)
    assert ((read - states).abs() <= 8 * torch.finfo(dtype).eps * size).all()


@given(smooth=st.booleans(), rotation=st.sampled_from([None, "hadamard", "random"]))
def test_scores_and_mixtures_are_those_of_the_states(smooth: bool, rotation: str | None) -> None:
    """In its frame a query meets the keys as it would have outside, and so do weights the values."""
    states = hard(40).double()
    frame = Frame(
        Smoothing.fit(states) if smooth else None, head_transform(get_transform(rotation), 16) if rotation else None
    )
    inside = frame.enter(states)
    torch.testing.assert_close(frame.leave(inside), states)
    query, weights = torch.randn(2, 2, 3, 16).double(), torch.rand(2, 2, 3, 40).double()
    asked, shift = frame.query(query)
    scores = asked @ inside.transpose(2, 3) + (0 if shift is None else shift.unsqueeze(3))
    torch.testing.assert_close(scores, query @ states.transpose(2, 3))
    torch.testing.assert_close(frame.mixture(weights @ inside, weights.sum(3)), weights @ states)


@pytest.mark.parametrize("parts", [(299, 1), (1,) * 300, (150, 7, 143)], ids=["at once", "one by one", "in parts"])
def test_how_tokens_come_makes_no_difference(parts: tuple[int, ...]) -> None:
    """The first block is the first block, and what it says holds from there on."""
    states = hard()
    options = {"smoothing_key": True, "smoothing_value": True, "nbits": 4, "group_size": 8, "residual_length": 20}
    whole, split = (QuantizedLayer(CacheConfig(**options), 0) for _ in range(2))
    whole.update(states, states)
    for part in states.split(parts, dim=2):
        split.update(part, part)
    assert torch.equal(split.keys, whole.keys)
    assert torch.equal(split.values, whole.values)


def test_batch_rows_are_smoothed_each_on_its_own() -> None:
    """A row reads the same alone and beside others, and keeps its statistics when rows are selected."""
    states = hard(batch=3)
    options = {"smoothing_key": True, "smoothing_value": True, "nbits": 4, "group_size": 8}
    together, alone = (QuantizedLayer(CacheConfig(**options), 0) for _ in range(2))
    together.update(states, states)
    alone.update(states[1:2], states[1:2])
    together.batch_select_indices(torch.tensor([1]))
    assert torch.equal(together.keys, alone.keys)
    more = hard(100, batch=1)
    together.update(more, more)
    alone.update(more, more)
    assert torch.equal(together.values, alone.values)


def test_values_with_means_lose_less() -> None:
    """On the token axis, where all channels share a scale."""
    states = torch.randn(1, 2, 300, 16) + 5 * torch.randn(1, 2, 1, 16)
    errors = []
    for smooth in (False, True):
        layer = QuantizedLayer(CacheConfig(nbits=2, group_size=8, smoothing_value=smooth), 0)
        layer.update(states, states)
        errors.append(float((layer.values - states).square().mean()))
    assert errors[1] < errors[0] / 5


def test_only_true_and_false_will_do() -> None:
    """A name is refused, and said to be."""
    with pytest.raises(OptionValueError, match="smoothing_key='mean' cannot work: expected True or False"):
        CacheConfig(smoothing_key="mean")

"""Rotations of a head's channels."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant import QuantizedCache
from kvquant.errors import UnsupportedError
from kvquant_plugins.rotations import Hadamard, RandomHadamard, block_size

ROTATIONS = {"hadamard": Hadamard, "random": RandomHadamard}
CHANNELS = [2, 16, 64, 80, 96, 112, 128, 256]


def matrix(rotation, channels):
    """What the rotation multiplies a row with, from the right."""
    return rotation.apply(torch.eye(channels, dtype=torch.float64))


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_it_is_orthogonal_and_can_be_undone(name, channels):
    """So no attention score changes."""
    rotation = ROTATIONS[name](channels)
    rows = matrix(rotation, channels)
    torch.testing.assert_close(rows @ rows.T, torch.eye(channels, dtype=torch.float64), rtol=0, atol=1e-12)
    states = torch.randn(2, 3, 5, channels)
    torch.testing.assert_close(rotation.undo(rotation.apply(states)), states)
    torch.testing.assert_close(rotation.apply(states), states @ rows.float())


@pytest.mark.parametrize("channels", CHANNELS)
def test_it_is_hadamard_s_matrix(channels):
    """Sylvester's, by its definition: the sign is the parity of the bits that row and column share."""
    size = block_size(channels)
    signs = [[(-1) ** (row & column).bit_count() for column in range(size)] for row in range(size)]
    expected = torch.block_diag(*[torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)] * (channels // size))
    torch.testing.assert_close(matrix(Hadamard(channels), channels), expected)


def test_random_signs_spread_what_is_alike_in_all_channels():
    """Which Hadamard's matrix would gather in one."""
    states = torch.ones(1, 64)
    assert float(Hadamard(64).apply(states).abs().max()) == pytest.approx(8)
    assert float(RandomHadamard(64).apply(states).abs().max()) < 4


@given(
    rows=st.integers(1, 40), start=st.integers(0, 39), name=st.sampled_from(sorted(ROTATIONS)), seed=st.integers(0, 99)
)
def test_a_row_does_not_depend_on_the_others(rows, start, name, seed):
    """To the last bit: codes must not depend on how tokens come."""
    states = torch.randn(40, 96, generator=torch.Generator().manual_seed(seed))
    part = states[start : start + rows]
    rotation = ROTATIONS[name](96)
    assert torch.equal(rotation.apply(part), rotation.apply(states)[start : start + rows])


@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    rotation=st.sampled_from(sorted(ROTATIONS)),
    axis=st.sampled_from(["channel", "token"]),
)
def test_a_cache_holds_the_same_however_tokens_come(sizes, rotation, axis):
    """And reads the states back within the error of 8 bits."""
    states = torch.randn(1, 2, sum(sizes), 32, generator=torch.Generator().manual_seed(0))
    options = {"nbits": 8, "group_size": 32, "residual_length": 0, "axis_key": axis, "rotation_key": rotation}
    whole, parts = QuantizedCache(**options), QuantizedCache(**options)
    whole.update(states, states, 0)
    for part in states.split(sizes, dim=2):
        parts.update(part, part, 0)
    assert torch.equal(whole.layers[0].keys, parts.layers[0].keys)
    torch.testing.assert_close(whole.layers[0].keys, states, rtol=0, atol=0.1)


def test_it_spreads_outlier_channels():
    """Keys of one scale a token lose far less where a channel is large."""
    states = torch.randn(1, 2, 256, 64)
    states[..., 5] *= 30
    errors = []
    for rotation in (None, "hadamard"):
        options = {"axis_key": "token", "smoothing_key": False, "rotation_key": rotation}
        cache = QuantizedCache(nbits=4, residual_length=0, **options)
        cache.update(states, states, 0)
        errors.append(float((cache.layers[0].keys - states).square().mean()))
    assert errors[1] < errors[0] / 5


def test_a_head_that_cannot_be_rotated_is_refused():
    """An odd number of channels has no pairs."""
    cache = QuantizedCache(rotation_key="hadamard", group_size=64, axis_value="channel")
    states = torch.randn(1, 1, 4, 15)
    with pytest.raises(
        UnsupportedError, match=r"rotation_key='hadamard' does not work with head_dim=15: .* must be even"
    ):
        cache.update(states, states, 0)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_crop_and_reorder_leave_the_states(rotation):
    """As without a rotation."""
    states = torch.randn(2, 2, 200, 32)
    cache = QuantizedCache(nbits=4, residual_length=0, group_size=32, rotation_key=rotation, rotation_value=rotation)
    cache.update(states, states, 0)
    held = cache.layers[0].keys.clone()
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.crop(-9)
    assert torch.equal(cache.layers[0].keys, held[[1, 1], :, :-9])

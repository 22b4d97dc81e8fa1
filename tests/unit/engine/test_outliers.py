"""Outlier tokens: which are chosen, and what is refused of those in a file."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.engine.outliers import Outliers, kept_bytes, kept_tokens
from kvquant.engine.state import MisfitError, Saved
from tests.support import FORMATS

pytestmark = pytest.mark.usefixtures("formats")


@pytest.mark.parametrize(
    ("share", "block", "kept"),
    [(0, 64, 0), (0.015, 64, 1), (0.001, 64, 1), (0.03, 64, 2), (0.03, 192, 6), (0.5, 32, 16), (0.5, 1, 1)],
)
def test_a_share_is_rounded_to_whole_tokens_of_a_block(share, block, kept):
    """To the nearest, and to one at least."""
    assert kept_tokens(share, block) == kept


def test_the_worst_of_each_block_are_chosen_for_each_head():
    """By squared error, and the earlier of two that are alike."""
    errors = torch.zeros(1, 2, 8, 3)
    errors[0, 0, 1, 0], errors[0, 0, 2, :2] = 2.0, -1.5  # 4.0 and 4.5
    errors[0, 0, 5], errors[0, 0, 7] = 1.0, -1.0
    errors[0, 1, 3], errors[0, 1, 6] = 0.1, 0.2
    chosen = Outliers.chosen(torch.zeros_like(errors), errors, block=4, kept=1)
    assert chosen.positions.tolist() == [[[[2], [1]], [[3], [2]]]]
    assert chosen.positions.dtype == torch.int32


@given(
    tokens=st.integers(1, 6), block=st.sampled_from([1, 4, 24]), channels=st.integers(1, 40), seed=st.integers(0, 999)
)
def test_the_choice_is_that_of_each_block_alone(tokens, block, channels, seed):
    """To the last bit, whatever comes in the same call; errors are small integers, so that many are alike."""
    random = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 2, tokens * block, channels, generator=random)
    errors = torch.randint(-1, 2, states.shape, generator=random).float()
    kept = kept_tokens(0.3, block)
    whole = Outliers.chosen(states, errors, block, kept)
    for at in range(tokens):
        part = slice(at * block, (at + 1) * block)
        alone = Outliers.chosen(states[:, :, part], errors[:, :, part], block, kept)
        assert torch.equal(alone.positions, whole.positions[:, :, at : at + 1])
        assert torch.equal(alone.states, whole.states[:, :, at : at + 1])


@pytest.mark.parametrize("kind", FORMATS)
def test_they_are_kept_in_the_type_that_they_came_in(kind):
    """And come back to the last bit; memory is counted as `kept_bytes` has it, and the real share is reported."""
    config = CacheConfig(backend=f"test-{kind}", nbits=1, group_size=16, residual_length=0, outlier_share=0.1)
    layer = QuantizedLayer(config, 0)
    states = torch.randn(2, 3, 64, 32).bfloat16()
    layer.update(states, states)
    assert ((layer.keys == states).all(-1).unflatten(2, (4, 16)).sum(-1) >= 2).all()
    memory = layer.memory()
    assert memory.parts["outliers"] == 2 * (2 * 3 * 4) * kept_bytes(2, 32, 2)
    assert memory.outlier_share == 2 / 16
    assert memory.bits_per_element > 1 + 8 * memory.parts["outliers"] / memory.quantized_elements


class _Tensor:
    """A tensor of a file."""

    def __init__(self, tensor):
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    def read(self):
        return self.tensor


@pytest.mark.parametrize(
    ("positions", "states", "problem"),
    [
        (torch.tensor([[[[3], [8]]]]).int(), torch.zeros(1, 1, 2, 1, 4), "outlier_positions beyond a block of 8"),
        (torch.tensor([[[[-1], [7]]]]).int(), torch.zeros(1, 1, 2, 1, 4), "outlier_positions beyond a block of 8"),
        (torch.tensor([[[[3], [7]]]]), torch.zeros(1, 1, 2, 1, 4), "has outlier_positions of shape"),
        (torch.tensor([[[[3], [7]]]]).int(), torch.zeros(1, 1, 2, 1, 4).half(), "has outlier_states of shape"),
        (torch.tensor([[[[3]]]]).int(), torch.zeros(1, 1, 1, 1, 4), "has outlier_positions of shape"),
    ],
)
def test_those_of_a_file_must_fit(positions, states, problem):
    """A kernel writes where positions say, so they are looked at."""
    saved = Saved({}, {"outlier_positions": _Tensor(positions), "outlier_states": _Tensor(states)})
    with pytest.raises(MisfitError, match=problem):
        Outliers.restored(saved, (1, 1, 13, 4), torch.float32, block=8, kept=1)

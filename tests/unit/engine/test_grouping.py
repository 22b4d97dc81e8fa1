"""Rows hold the numbers that the axis says, and go back where they came from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.engine.grouping import (
    TOKEN_AXIS_BLOCK,
    block_tokens,
    grouped,
    grouped_grid,
    rows_to_states,
    scale_grid_shape,
    states_to_rows,
    ungrouped,
)

SHAPE = (2, 3, 8, 12)


def test_channel_axis_groups_consecutive_tokens_of_one_channel():
    """The first row is tokens 0 to 3 of channel 0 of head 0; the next is channel 1."""
    states = torch.arange(2 * 3 * 8 * 12).reshape(SHAPE)
    rows = states_to_rows(states, "channel", 4)
    assert torch.equal(rows[0], states[0, 0, :4, 0])
    assert torch.equal(rows[1], states[0, 0, :4, 1])
    assert torch.equal(rows[12], states[0, 0, 4:, 0])


def test_token_axis_groups_consecutive_channels_of_one_token():
    """The first row is channels 0 to 3 of token 0 of head 0; the next is channels 4 to 7."""
    states = torch.arange(2 * 3 * 8 * 12).reshape(SHAPE)
    rows = states_to_rows(states, "token", 4)
    assert torch.equal(rows[0], states[0, 0, 0, :4])
    assert torch.equal(rows[1], states[0, 0, 0, 4:8])


@given(
    axis=st.sampled_from(["channel", "token"]),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    blocks=st.integers(0, 4),
    group=st.sampled_from([1, 2, 4, 8]),
    width=st.integers(1, 4),
)
def test_rows_go_back_where_they_came_from(axis, batch, heads, blocks, group, width):
    """States, rows, states: nothing moves; and scales in row order broadcast over the right numbers."""
    shape = (batch, heads, blocks * group, width * group)
    states = torch.randn(shape)
    rows = states_to_rows(states, axis, group)
    assert rows.shape == (states.numel() // group, group)
    assert torch.equal(rows_to_states(rows, shape, axis, group), states)

    grid = rows.sum(1).reshape(scale_grid_shape(shape, axis, group))
    spread = ungrouped(torch.zeros_like(grouped(states, axis, group)) + grouped_grid(grid, axis), axis)
    assert torch.equal(spread, rows_to_states(rows.sum(1, keepdim=True).expand_as(rows), shape, axis, group))


@pytest.mark.parametrize(
    ("groups", "block"),
    [
        ([("channel", 64), ("token", 32)], 64),
        ([("channel", 32), ("channel", 48)], 96),
        ([("token", 64), ("token", 128)], TOKEN_AXIS_BLOCK),
    ],
)
def test_a_block_holds_whole_groups_of_every_stream(groups, block):
    """Streams that group tokens decide the block; others follow."""
    assert block_tokens(groups) == block

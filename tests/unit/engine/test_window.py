"""When tokens leave the window."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvquant.engine.window import WindowPolicy


@pytest.mark.parametrize(
    ("window", "leaving"), [(0, 0), (128, 0), (191, 0), (192, 64), (255, 64), (256, 128), (1000, 832)]
)
def test_whole_blocks_leave_once_the_window_holds_a_block_too_many(window, leaving):
    """128 tokens stay at least; below 192 nothing leaves."""
    assert WindowPolicy(sink_length=0, residual_length=128, block=64).leaving(window) == leaving


@given(residual=st.integers(0, 300), block=st.integers(1, 128), steps=st.lists(st.integers(0, 500), max_size=20))
def test_the_partition_does_not_depend_on_how_appends_were_split(residual, block, steps):
    """Letting go after every append leaves the window as letting go once at the end."""
    policy, window = WindowPolicy(0, residual, block), 0
    for added in steps:
        window += added
        window -= policy.leaving(window)
    assert window == sum(steps) - policy.leaving(sum(steps))


@given(block=st.integers(1, 500))
def test_a_page_holds_whole_blocks(block):
    """Only a crop may end a page inside a block."""
    assert WindowPolicy(0, 0, block).page_tokens % block == 0

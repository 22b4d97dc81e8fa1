"""Codes survive packing, and take the bits they say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.engine.packing import WIDTHS, pack, packed_bytes, table_sizes, unpack, widths_of
from tests.support import random_codes


@given(nbits=st.sampled_from(WIDTHS), n=st.integers(1, 257), rows=st.integers(0, 5), seed=st.integers(0, 99))
def test_unpacking_undoes_packing(nbits, n, rows, seed):
    """Any codes of any width and any number come back."""
    codes = random_codes((2, rows, n), nbits, seed)
    packed = pack(codes, nbits)
    assert packed.shape == (2, rows, packed_bytes(n, nbits))
    assert torch.equal(unpack(packed, nbits, n), codes)


@pytest.mark.parametrize("nbits", WIDTHS)
def test_a_code_takes_exactly_its_bits(nbits):
    """64 codes of 3 bits take 24 bytes, not 32, and 64 of 2.5 bits 20."""
    assert pack(torch.zeros(64, dtype=torch.uint8), nbits).nbytes == 64 * nbits // 8


@pytest.mark.parametrize(
    ("nbits", "widths", "sizes"), [(4, (4,), (16,)), (1.5, (2, 1), (4, 2)), (3.5, (4, 3), (16, 8))]
)
def test_half_a_bit_is_a_wider_first_half(nbits, widths, sizes):
    """And a codebook has a table for each half."""
    assert widths_of(nbits) == widths
    assert table_sizes(nbits) == sizes


def test_layout_is_planar():
    """Byte j of a 4-bit row holds code j low and code j + n/2 high: the layout that kernels rely on."""
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [low | (low + 8) << 4 for low in range(8)]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one():
    """The low two bits come first, packed as two bits; the high bits follow, packed as one."""
    codes = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)
    expected = torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)])
    assert torch.equal(pack(codes, 3), expected)


@pytest.mark.parametrize("nbits", [1.5, 2.5, 3.5])
def test_a_mixed_row_is_a_row_of_the_lower_width_and_bits_in_order(nbits):
    """Bit j % 8 of byte j // 8 behind that row is the highest bit of code j."""
    lower = int(nbits)
    highest = torch.tensor([1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1], dtype=torch.uint8)
    low = random_codes((32,), lower, 0)
    codes = low | torch.cat([highest, torch.zeros_like(highest)]) << lower
    assert torch.equal(pack(codes, nbits), torch.cat([pack(low, lower), torch.tensor([25, 130], dtype=torch.uint8)]))


def test_packing_does_not_write_into_its_input():
    """The codes given stay as they are."""
    codes = torch.randint(0, 16, (4, 32), dtype=torch.uint8)
    before = codes.clone()
    pack(codes, 4)
    assert torch.equal(codes, before)

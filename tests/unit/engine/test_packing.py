"""Codes survive packing, and take the bits they say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.engine.packing import WIDTHS, pack, packed_bytes, unpack


@given(nbits=st.sampled_from(WIDTHS), n=st.integers(1, 257), rows=st.integers(0, 5), seed=st.integers(0, 99))
def test_unpacking_undoes_packing(nbits, n, rows, seed):
    """Any codes of any width and any number come back."""
    codes = torch.randint(0, 2**nbits, (2, rows, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, nbits)
    assert packed.shape == (2, rows, packed_bytes(n, nbits))
    assert torch.equal(unpack(packed, nbits, n), codes)


@pytest.mark.parametrize("nbits", WIDTHS)
def test_a_code_takes_exactly_its_bits(nbits):
    """64 codes of 3 bits take 24 bytes, not 32."""
    assert pack(torch.zeros(64, dtype=torch.uint8), nbits).nbytes == 64 * nbits // 8


def test_layout_is_planar():
    """Byte j of a 4-bit row holds code j low and code j + n/2 high: the layout that kernels rely on."""
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [low | (low + 8) << 4 for low in range(8)]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one():
    """The low two bits come first, packed as two bits; the high bits follow, packed as one."""
    codes = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)
    expected = torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)])
    assert torch.equal(pack(codes, 3), expected)


def test_packing_does_not_write_into_its_input():
    """The codes given stay as they are."""
    codes = torch.randint(0, 16, (4, 32), dtype=torch.uint8)
    before = codes.clone()
    pack(codes, 4)
    assert torch.equal(codes, before)

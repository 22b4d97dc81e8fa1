"""Trellis codes: what they stand for, and what a store makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.engine.trellis import Taps, level_indices
from kvquant.errors import BackendContractError
from kvquant.plugin import QuantizedRows, Scheme


def by_definition(codes: list[int], taps: Taps) -> list[int]:
    """Read a row as `kvquant.plugin.QuantizedRows` says."""
    indices = []
    for at, code in enumerate(codes):
        past = [codes[at - back] & 1 if back <= at else 0 for back in range(9)]
        high, low = (sum(bit for back, bit in enumerate(past) if tap >> back & 1) % 2 for tap in taps)
        indices.append(4 * (code >> 1) + 2 * high + low)
    return indices


@given(st.lists(st.integers(0, 7), min_size=1, max_size=40), st.integers(1, 511), st.integers(1, 511))
def test_indices_are_those_of_the_definition(codes: list[int], high: int, low: int) -> None:
    """Along any dimension."""
    taps, row = Taps(high, low), torch.tensor(codes, dtype=torch.uint8)
    expected = torch.tensor(by_definition(codes, taps), dtype=torch.uint8)
    assert torch.equal(level_indices(row, taps, 0), expected)
    assert torch.equal(level_indices(row[None, :, None].expand(2, -1, 3), taps, 1)[1, :, 2], expected)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_a_store_reads_what_the_backend_wrote(axis: str) -> None:
    """Cropped inside a group, and with more behind."""
    layer = QuantizedLayer(
        CacheConfig(backend="trellis", nbits=2, axis_key=axis, axis_value=axis, group_size=8, residual_length=0), 0
    )
    states = torch.randn(2, 2, 96, 16)
    layer.update(states, states)
    before = layer.keys
    assert ((before - states).square().mean()) < 0.15
    layer.crop(-37)
    assert torch.equal(layer.keys, before[:, :, :59])
    layer.update(states[:, :, 59:], states[:, :, 59:])
    assert torch.equal(layer.keys[:, :, :59], before[:, :, :59])


class Broken:
    """Returns what it is told to."""

    answer: dict[str, object]

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def quantize(self, rows: torch.Tensor) -> QuantizedRows:
        whole = {"codes": torch.zeros(rows.shape, dtype=torch.uint8), "scale": rows[:, 0], "taps": (5, 2)}
        return QuantizedRows(**{**whole, "table": torch.linspace(-1, 1, 2 ** (self.scheme.nbits + 1)), **self.answer})


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"taps": (5, 512)}, "taps is .5, 512. instead of two whole numbers from 1 to 511"),
        ({"taps": [5, 2]}, "taps is .5, 2. instead of two"),
        ({"table": None}, "needs a table with its taps"),
        ({"table": torch.ones(4)}, "table has shape .4. instead of .8."),
    ],
    ids=["too long", "a list", "no table", "table"],
)
def test_a_wrong_trellis_is_caught_at_the_border(backend, answer: dict[str, object], problem: str) -> None:
    """Before anything is stored."""
    name = backend(type("Mine", (Broken,), {"answer": answer}), nbits=(1, 2, 3), formats=("trellis",))
    layer = QuantizedLayer(CacheConfig(backend=name, nbits=2, group_size=8, residual_length=0), 0)
    with pytest.raises(BackendContractError, match=problem):
        layer.update(torch.randn(1, 1, 32, 8), torch.randn(1, 1, 32, 8))
    assert layer.get_seq_length() == 0


def test_a_trellis_has_codes_of_at_most_three_bits(backend) -> None:
    """A fourth would need a table of 32 entries."""
    name = backend(type("Mine", (Broken,), {"answer": {}}), formats=("affine", "trellis"))
    layer = QuantizedLayer(CacheConfig(backend=name, nbits=4, group_size=8, residual_length=0), 0)
    with pytest.raises(BackendContractError, match="a trellis has codes of 1, 2, 3 bits, and nbits=4"):
        layer.update(torch.randn(1, 1, 32, 8), torch.randn(1, 1, 32, 8))

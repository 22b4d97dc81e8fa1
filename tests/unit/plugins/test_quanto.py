"""The quanto backend: what quanto makes of a row, and transformers' axes in our words."""

from __future__ import annotations

import pytest
import torch
from optimum import quanto
from torch import Tensor
from transformers.cache_utils import QuantoQuantizedLayer

from kvquant.engine.grouping import rows_to_states, states_to_rows
from kvquant_plugins.quanto import kvquant_register_backends
from tests.unit.plugins.conftest import quantizer, read

QTYPES = {2: quanto.qint2, 4: quanto.qint4, 8: quanto.qint8}


def library(rows: Tensor, nbits: int, optimizer: str) -> Tensor:
    """Dequantise what quanto makes of rows in one call."""
    if optimizer == "absmax":
        scale = quanto.AbsmaxOptimizer()(rows, QTYPES[nbits], 0)
        return quanto.quantize_weight(rows, QTYPES[nbits], 0, scale).dequantize()
    chosen = quanto.MaxOptimizer() if optimizer == "max" else quanto.HqqOptimizer()
    scale, shift = chosen(rows, QTYPES[nbits], 0, rows.shape[1])
    return quanto.quantize_weight(rows, QTYPES[nbits], 0, scale, shift, rows.shape[1]).dequantize()


@pytest.mark.parametrize(("nbits", "optimizer"), [(2, "max"), (4, "max"), (8, "absmax")])
def test_states_are_quanto_s(nbits: int, optimizer: str, random_rows: Tensor) -> None:
    """The same codes, the same scale, the same numbers back; these are the defaults."""
    ours = read(quantizer("quanto", nbits).quantize(random_rows))
    torch.testing.assert_close(ours, library(random_rows, nbits, optimizer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nbits", [2, 4])
def test_hqq_states_are_quanto_s_for_each_row_alone(nbits: int, random_rows: Tensor) -> None:
    """Row by row, twice, since quanto takes a single row for a tensor without groups.

    Where a step leaves the same mean error, the last digit of a float32 sum decides in the library whether it is kept.
    """
    ours = read(quantizer("quanto", nbits, optimizer="hqq").quantize(random_rows))
    theirs = torch.cat([library(row.expand(2, -1), nbits, "hqq")[:1] for row in random_rows.split(1)])
    equal = torch.isclose(ours, theirs, rtol=1e-4, atol=1e-4).all(dim=1)
    assert equal.float().mean() > 0.9
    errors = [(states - random_rows).abs().mean() for states in (ours, theirs)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=0)
    assert errors[0] < (read(quantizer("quanto", nbits).quantize(random_rows)) - random_rows).abs().mean()


@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_numbers_come_back_within_half_a_step(nbits: int, random_rows: Tensor) -> None:
    """With the default optimiser of each width."""
    result = quantizer("quanto", nbits).quantize(random_rows)
    assert ((read(result) - random_rows).abs().amax(1) <= result.scale / 2 * 1.001).all()


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("nbits", [2, 4])
def test_integer_axes_are_transformers(axis: int, nbits: int) -> None:
    """Under our name for its axis, states come back as from transformers' own layer."""
    (spec,) = kvquant_register_backends()
    name = spec.capabilities.axis_aliases[axis]
    states = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    layer = QuantoQuantizedLayer(nbits=nbits, axis_key=axis, axis_value=axis, q_group_size=32)
    theirs = layer._dequantize(layer._quantize(states, axis))
    rows = quantizer("quanto", nbits, 32).quantize(states_to_rows(states, name, 32).contiguous())
    ours = rows_to_states(read(rows), tuple(states.shape), name, 32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("nbits", "optimizer", "works"), [(8, "max", "absmax"), (4, "absmax", "max, hqq"), (2, "best", "max, hqq")]
)
def test_an_optimizer_that_does_not_fit_is_refused(nbits: int, optimizer: str, works: str) -> None:
    """The message names the option, the value and what works."""
    with pytest.raises(
        ValueError, match=f"^optimizer={optimizer!r} is not supported with nbits={nbits}; supported: {works}$"
    ):
        quantizer("quanto", nbits, optimizer=optimizer)

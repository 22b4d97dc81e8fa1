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
FLOATS = ("qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2")


def library(rows: Tensor, qtype: quanto.qtype, optimizer: str) -> Tensor:
    """Dequantise what quanto makes of rows in one call."""
    if optimizer == "absmax":
        scale = quanto.AbsmaxOptimizer()(rows, qtype, 0)
        return quanto.quantize_weight(rows, qtype, 0, scale).dequantize()
    chosen = quanto.MaxOptimizer() if optimizer == "max" else quanto.HqqOptimizer()
    # Through `optimize`, which takes a single row for what it is.
    scale, shift = chosen.optimize(rows, qtype, 0)
    return quanto.quantize_weight(rows, qtype, 0, scale, shift).dequantize()


@pytest.mark.parametrize(("nbits", "optimizer"), [(2, "max"), (4, "max"), (8, "absmax")])
def test_states_are_quanto_s(nbits: int, optimizer: str, random_rows: Tensor) -> None:
    """The same codes, the same scale, the same numbers back; these are the defaults."""
    ours = read(quantizer("quanto", nbits).quantize(random_rows))
    torch.testing.assert_close(ours, library(random_rows, QTYPES[nbits], optimizer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qtype", FLOATS)
def test_states_in_8_bit_floats_are_quanto_s(qtype: str, random_rows: Tensor) -> None:
    """Digit for digit, though table and scale share the size between them otherwise."""
    result = quantizer("quanto", 8, qtype=qtype).quantize(random_rows)
    assert torch.equal(read(result), library(random_rows, getattr(quanto, qtype), "absmax"))
    assert 1 < result.table.max() < 2
    assert torch.equal(result.codes.view(getattr(torch, qtype.removeprefix("q"))).isnan().sum(), torch.tensor(0))


@pytest.mark.parametrize("nbits", [2, 4])
def test_hqq_states_are_quanto_s_for_each_row_alone(nbits: int, random_rows: Tensor) -> None:
    """Row by row, the same steps to the last digit; and better than min/max."""
    ours = read(quantizer("quanto", nbits, optimizer="hqq").quantize(random_rows))
    theirs = torch.cat([library(row, QTYPES[nbits], "hqq") for row in random_rows.split(1)])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    plain = read(quantizer("quanto", nbits).quantize(random_rows))
    assert (ours - random_rows).abs().mean() < (plain - random_rows).abs().mean()


def test_quanto_itself_has_no_other_pairs_of_width_and_optimizer(random_rows: Tensor) -> None:
    """Why absmax is not offered with 2 and 4 bits, nor max with 8. Should this fail, the library has learnt it."""
    scale = quanto.AbsmaxOptimizer()(random_rows, quanto.qint4, 0)
    with pytest.raises(ValueError, match="shift must be specified"):
        quanto.quantize_weight(random_rows, quanto.qint4, 0, scale)
    scale, shift = quanto.MaxOptimizer()(random_rows, quanto.qint8, 0)
    with pytest.raises(ValueError, match="shift cannot be specified"):
        quanto.quantize_weight(random_rows, quanto.qint8, 0, scale, shift)


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
    ("nbits", "option", "value", "works"),
    [
        (8, "optimizer", "max", "absmax"),
        (4, "optimizer", "absmax", "max, hqq"),
        (2, "optimizer", "best", "max, hqq"),
        (4, "qtype", "qfloat8_e5m2", "qint4"),
        (2, "qtype", "qint4", "qint2"),
        (8, "qtype", "qfloat8", "qint8, qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(nbits: int, option: str, value: str, works: str) -> None:
    """The message names the option, the value and what works."""
    with pytest.raises(
        ValueError, match=f"^{option}={value!r} is not supported with nbits={nbits}; supported: {works}$"
    ):
        quantizer("quanto", nbits, **{option: value})

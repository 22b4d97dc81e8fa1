"""The reference backend: min/max, every number within half a step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvquant
from tests.unit.plugins.conftest import HARD_ROWS, as_dtype, quantizer, read

WIDTHS = (1, 2, 3, 4, 8)


def assert_within_half_a_step(rows: Tensor, nbits: int) -> None:
    """Up to rounding in the type of the scale, at the size of the row's numbers."""
    result = quantizer("reference", nbits, rows.shape[1], scale="range").quantize(rows)
    rounding = 2 * torch.finfo(result.scale.dtype).eps * rows.to(result.scale.dtype).abs().amax(1) + 3e-36
    error = (read(result) - rows.to(result.scale.dtype)).abs().amax(1)
    assert (error <= result.scale / 2 + rounding).all()


@pytest.mark.parametrize("nbits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", HARD_ROWS)
def test_hard_rows_come_back_within_half_a_step(name: str, dtype: torch.dtype, nbits: int) -> None:
    """Constant, zeros, one huge outlier, float16 near its limits, tiny, in every type."""
    assert_within_half_a_step(as_dtype(HARD_ROWS[name], dtype), nbits)


@settings(max_examples=100)
@given(
    nbits=st.sampled_from(WIDTHS),
    numbers=st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=40),
)
def test_any_row_comes_back_within_half_a_step(nbits: int, numbers: list[float]) -> None:
    """Whatever the numbers."""
    assert_within_half_a_step(torch.tensor([numbers]), nbits)


@pytest.mark.parametrize("nbits", WIDTHS)
def test_scale_and_offset_are_the_paper_s(nbits: int, random_rows: Tensor) -> None:
    """scale = (max - min) / (2**nbits - 1), offset = min; both ends of a row are hit."""
    result = quantizer("reference", nbits, scale="range").quantize(random_rows)
    low, high = random_rows.amin(1), random_rows.amax(1)
    assert torch.equal(result.scale, (high - low) / (2**nbits - 1))
    assert torch.equal(result.offset, low)
    assert (result.codes.amin(1) == 0).all()
    assert (result.codes.amax(1) == 2**nbits - 1).all()


def test_a_constant_row_has_scale_zero() -> None:
    """And so comes back exactly."""
    result = quantizer("reference", 2).quantize(HARD_ROWS["constant"])
    assert (result.scale == 0).all()
    assert (result.codes == 0).all()
    assert torch.equal(read(result), HARD_ROWS["constant"])


def test_double_rows_keep_double_scales() -> None:
    """Steps far below float32's resolution are kept."""
    rows = 1 + torch.rand(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-9
    result = quantizer("reference", 8).quantize(rows)
    assert result.scale.dtype == result.offset.dtype == torch.float64
    assert (read(result) - rows).abs().max() < 1e-9 / 255


# ------------------------------------------------------------------------------------------------ scale="error"


def squared_error(rows: Tensor, nbits: int, **options: str) -> Tensor:
    """Return each row's squared error over its range squared, in float64."""
    result = quantizer("reference", nbits, rows.shape[1], **options).quantize(rows)
    width = (rows.amax(1) - rows.amin(1)).double().clamp(min=1e-30)
    return ((read(result).double() - rows.double()) / width[:, None]).square().sum(1)


@settings(max_examples=100)
@given(
    nbits=st.sampled_from(WIDTHS),
    numbers=st.lists(st.floats(-100, 100, width=32, allow_subnormal=False), min_size=1, max_size=70),
)
def test_least_error_is_never_more_than_that_of_the_range(nbits: int, numbers: list[float]) -> None:
    """Whatever the numbers, up to rounding."""
    rows = torch.tensor([numbers])
    assert squared_error(rows, nbits, scale="error") <= squared_error(rows, nbits, scale="range") * (
        1 + 1e-3
    ) + 1e-9 * len(numbers)


@pytest.mark.parametrize(("nbits", "most"), [(1, 0.13), (2, 0.54), (3, 0.82), (4, 0.93)])
def test_least_error_of_normal_numbers(nbits: int, most: float) -> None:
    """At 64 to a row, as a share of what the range leaves; at 2 bits less than the best fixed levels, 0.1188, would."""
    rows = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    by_range, least = (
        (read(quantizer("reference", nbits, **options).quantize(rows)) - rows).square().mean()
        for options in ({"scale": "range"}, {"scale": "error"})
    )
    assert least < most * by_range
    assert nbits != 2 or least < 0.1188


@pytest.mark.parametrize("nbits", WIDTHS)
def test_least_fourth_powers_of_normal_numbers(nbits: int) -> None:
    """Less of them than the range leaves, and than least squares do, which are worse for the worst numbers too."""
    rows = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    by_range, squares, fourth = (
        read(quantizer("reference", nbits, scale=scale).quantize(rows)) - rows for scale in ("range", "error", "fourth")
    )
    assert fourth.pow(4).mean() < min(by_range.pow(4).mean(), squares.pow(4).mean())
    assert fourth.square().mean() < by_range.square().mean()


@settings(max_examples=100)
@given(
    nbits=st.sampled_from(WIDTHS),
    numbers=st.lists(st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False), min_size=1, max_size=40),
)
def test_least_fourth_powers_are_never_more_than_those_of_the_range(nbits: int, numbers: list[float]) -> None:
    """Whatever the numbers, up to rounding."""
    rows = torch.tensor([numbers], dtype=torch.float64)
    by_range, fourth = (
        (read(quantizer("reference", nbits, rows.shape[1], scale=scale).quantize(rows)) - rows).pow(4).sum()
        for scale in ("range", "fourth")
    )
    assert fourth <= by_range * (1 + 1e-6) + float(rows.abs().max()) ** 4 * 1e-30


@pytest.mark.parametrize("scale", ["error", "fourth"])
@pytest.mark.parametrize("name", HARD_ROWS)
def test_least_error_of_hard_rows_is_finite(name: str, scale: str) -> None:
    """And a constant row comes back exactly."""
    for dtype in (torch.float32, torch.float64):
        rows = as_dtype(HARD_ROWS[name], dtype)
        result = quantizer("reference", 2, rows.shape[1], scale=scale).quantize(rows)
        assert read(result).isfinite().all()
        if name == "constant":
            assert torch.equal(read(result), rows)


@pytest.mark.parametrize(("nbits", "scale"), [(1, "fourth"), (2, "fourth"), (3, "fourth"), (4, "range"), (8, "range")])
def test_few_bits_take_the_least_fourth_powers(nbits: int, scale: str, random_rows: Tensor) -> None:
    """Unless told otherwise."""
    default, told = (
        quantizer("reference", nbits, **options).quantize(random_rows) for options in ({}, {"scale": scale})
    )
    assert torch.equal(default.codes, told.codes)
    assert torch.equal(default.scale, told.scale)


def test_a_scale_that_cannot_work_is_refused() -> None:
    """With what would work."""
    with pytest.raises(kvquant.KVQuantError, match="expected 'range', 'error' or 'fourth'"):
        kvquant.QuantizedCache("reference", options={"scale": "mse"})

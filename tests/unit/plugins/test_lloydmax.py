"""The lloydmax backend: levels and errors that the literature knows, and what fitting the scale brings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvquant
from kvquant_plugins.lloydmax import normal_levels
from tests.unit.plugins.conftest import quantizer, read

#: Mean squared error of the best quantiser of unit normal numbers (Max 1960, table I).
DISTORTIONS = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
every_width = pytest.mark.parametrize("nbits", DISTORTIONS)


def normal(n_groups: int, group_size: int) -> Tensor:
    """Return unit normal rows, float32."""
    return torch.randn(n_groups, group_size, generator=torch.Generator().manual_seed(0))


def errors(rows: Tensor, nbits: int, scale: str) -> Tensor:
    """Return each row's mean squared error over its mean square, in float64."""
    result = quantizer("lloydmax", nbits, rows.shape[1], scale=scale).quantize(rows)
    squares = rows.double().square().mean(1).clamp(min=1e-30)
    return (read(result).double() - rows.double()).square().mean(1) / squares


def test_levels_are_those_of_max() -> None:
    """Table I of 1960, whose last digits were worked out by hand; those below zero mirror those above."""
    assert normal_levels(1)[1:] == pytest.approx([0.7980], rel=6e-4)
    assert normal_levels(2)[2:] == pytest.approx([0.4528, 1.510], rel=6e-4)
    assert normal_levels(3)[4:] == pytest.approx([0.2451, 0.7560, 1.344, 2.152], rel=6e-4)
    published = [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]
    assert normal_levels(4)[8:] == pytest.approx(published, rel=6e-4)
    assert normal_levels(4)[:8] == tuple(-level for level in reversed(normal_levels(4)[8:]))


@every_width
def test_levels_leave_the_least_error_there_is(nbits: int) -> None:
    """Known for normal numbers; by numerical integration, whatever the way in which they were found."""
    edges = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    levels = torch.tensor(normal_levels(nbits), dtype=torch.float64)
    nearest = levels[torch.bucketize(edges, (levels[1:] + levels[:-1]) / 2)]
    density = edges.square().div(-2).exp() / torch.tensor(2 * torch.pi).sqrt()
    left = torch.trapezoid((edges - nearest).square() * density, edges)
    assert float(left) == pytest.approx(DISTORTIONS[nbits], rel=1e-3)


@every_width
@pytest.mark.parametrize("scale", ["norm", "fit"])
def test_long_normal_rows_have_that_error(nbits: int, scale: str) -> None:
    """Whatever their magnitude."""
    assert float(errors(normal(64, 4096) * 30, nbits, scale).mean()) == pytest.approx(DISTORTIONS[nbits], rel=0.03)


@every_width
def test_a_rotation_makes_other_numbers_normal(nbits: int) -> None:
    """TurboQuant's MSE form through the cache: states far from normal keep the error of normal ones."""
    states = normal(4096, 128).reshape(1, 2, 2048, 128)
    states = states * states.abs()
    found = {}
    for rotation in (None, "random"):
        cache = kvquant.QuantizedCache(
            "lloydmax",
            nbits=nbits,
            axis_key="token",
            group_size=128,
            residual_length=0,
            rotation_key=rotation,
            options={"scale": "norm"},
        )
        cache.update(states, states, 0)
        found[rotation] = float((cache.layers[0].keys - states).square().mean() / states.square().mean())
    assert found["random"] == pytest.approx(DISTORTIONS[nbits], rel=0.15)
    assert found[None] > 1.2 * found["random"]


@settings(max_examples=100)
@given(
    nbits=st.sampled_from(list(DISTORTIONS)),
    numbers=st.lists(st.floats(-100, 100, width=32, allow_subnormal=False), min_size=1, max_size=70),
)
def test_a_fitted_scale_is_never_worse_than_the_norm(nbits: int, numbers: list[float]) -> None:
    """Whatever the numbers, up to rounding."""
    rows = torch.tensor([numbers])
    assert float(errors(rows, nbits, "fit")) <= float(errors(rows, nbits, "norm")) * (1 + 1e-3) + 1e-9


@pytest.mark.parametrize(("nbits", "most"), [(1, 0.999), (2, 0.98), (3, 0.92), (4, 0.80)])
def test_fitting_the_scale_lowers_the_error_of_short_rows(nbits: int, most: float) -> None:
    """Of 64 normal numbers, as a share of what the norm leaves."""
    rows = normal(4000, 64)
    assert errors(rows, nbits, "fit").mean() < most * errors(rows, nbits, "norm").mean()


def test_an_outlier_is_not_cut_off() -> None:
    """The norm would leave most of it out."""
    rows = normal(100, 64)
    rows[:, 5] = 1000
    assert (errors(rows, 4, "fit") < 0.3 * errors(rows, 4, "norm")).all()


def test_a_scale_that_cannot_work_is_refused() -> None:
    """With what would work."""
    with pytest.raises(kvquant.KVQuantError, match="'fit' or 'norm'"):
        kvquant.QuantizedCache("lloydmax", options={"scale": "rms"})

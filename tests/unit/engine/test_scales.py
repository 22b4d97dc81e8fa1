"""Scales in 8 bits: what a byte stands for, which rows fit, and what is stored where one does not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.engine.scales import LARGEST, LOWEST_EXPONENT, Levels, read_offset, read_scale, to_bytes
from kvquant.errors import OptionValueError
from kvquant.plugin import QuantizedRows, Scheme
from tests.support import MinMax, UniformCodebook

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def test_bytes_are_floating_numbers_with_three_bits_of_fraction() -> None:
    """From 2**-20 to 3840, in rising order, eight to an octave."""
    numbers = read_scale(ALL_BYTES, torch.float64)
    by_hand = [2.0 ** (LOWEST_EXPONENT + byte // 8) * (1 + byte % 8 / 8) for byte in range(256)]
    assert numbers.tolist() == by_hand
    assert (numbers[0], numbers[-1]) == (2.0**-20, LARGEST)


@given(st.floats(2.0**-20, LARGEST))
def test_a_scale_becomes_the_nearest_byte(scale: float) -> None:
    """Within half a step, a sixteenth at most."""
    rows = QuantizedRows(torch.zeros(1, 4, dtype=torch.uint8), torch.tensor([scale]).double(), table=torch.ones(4))
    made, fits = to_bytes(rows, torch.zeros(1, 4).double(), 2)
    numbers = read_scale(ALL_BYTES, torch.float64)
    assert abs(float(read_scale(made.scale, torch.float64)) - scale) == pytest.approx(
        float((numbers - scale).abs().min())
    )
    assert bool(fits)


@given(
    nbits=st.sampled_from([1, 2, 3, 4, 8]),
    more=st.sampled_from([0, 1]),
    far=st.floats(-1.2, 1.2),
    size=st.floats(-4, 2),
    seed=st.integers(0, 2**16),
)
def test_every_number_takes_the_nearest_level_there_is(
    nbits: int, more: int, far: float, size: float, seed: int
) -> None:
    """Brute force over all levels that the bytes allow, for rows near zero and some ranges away from it.

    Offsets of the second half of a mixed width are relative to the levels of codes of a bit more.
    """
    relative = Levels.of(nbits + more, None)
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)).double()
    rows = (rows + 4 * far) * 10**size
    made, fits = to_bytes(MinMax(Scheme(nbits, "token", 16)).quantize(rows), rows.clone(), nbits, relative)
    assert fits.all()
    assert made.offset is not None
    scale = read_scale(made.scale, torch.float64)
    offset = read_offset(made.offset, scale, relative)
    levels = torch.arange(2**nbits) * scale[:, None] + offset[:, None]
    read = levels.gather(1, made.codes.long())
    best = (levels[:, None] - rows[:, :, None]).abs().amin(2)
    torch.testing.assert_close((read - rows).abs(), best, rtol=1e-9, atol=1e-12 * 10**size)


@pytest.mark.parametrize("kind", [MinMax, UniformCodebook])
@pytest.mark.parametrize("nbits", [2, 4])
def test_little_is_lost(kind: type[MinMax], nbits: int) -> None:
    """Against the scales that the backend chose, in float64: a tenth of the error at most."""
    rows = torch.randn(500, 32).double()
    quantized = kind(Scheme(nbits, "token", 32)).quantize(rows)
    made, fits = to_bytes(quantized, rows.clone(), nbits)
    assert fits.all()

    def error(rows_: QuantizedRows, scale: torch.Tensor, offset: torch.Tensor | None) -> float:
        numbers = rows_.codes.double() if rows_.table is None else rows_.table[rows_.codes.long()]
        read = numbers * scale[:, None] + (0 if offset is None else offset[:, None])
        return float((read - rows).square().mean())

    scale = read_scale(made.scale, torch.float64)
    offset = None if made.offset is None else read_offset(made.offset, scale, Levels.of(nbits, made.table))
    assert error(made, scale, offset) < 1.1 * error(quantized, quantized.scale, quantized.offset)


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("value", [0.0, 3.3, -30000.0, 4000.0])
def test_a_constant_row_fits_and_comes_back_within_half_a_percent(value: float, more: int) -> None:
    """Padding makes such rows; they must not cost all later tokens their bytes."""
    rows = torch.full((1, 8), value).double()
    relative = Levels.of(2 + more, None)
    made, fits = to_bytes(MinMax(Scheme(2, "token", 8)).quantize(rows), rows.clone(), 2, relative)
    assert made.offset is not None
    scale = read_scale(made.scale, torch.float64)
    read = made.codes * scale[:, None] + read_offset(made.offset, scale, relative)[:, None]
    assert bool(fits)
    assert ((read - rows).abs() <= 0.005 * abs(value) + 1e-6).all()


@pytest.mark.parametrize(
    "rows",
    [torch.randn(1, 32) + 1000, torch.randn(1, 32) * 6e-4 + 20, torch.randn(1, 32) * 1e5, torch.randn(1, 32) * 1e-7],
    ids=["far from zero", "nearly constant", "large", "small"],
)
def test_rows_that_bytes_would_harm_do_not_fit(rows: torch.Tensor) -> None:
    """Nothing is lost silently."""
    _, fits = to_bytes(MinMax(Scheme(2, "token", 32)).quantize(rows), rows.clone(), 2)
    assert not fits.any()


@pytest.mark.parametrize(("group", "bits"), [(32, 0.5), (64, 0.25)])
def test_groups_pay_a_byte_for_scale_and_offset_each(group: int, bits: float) -> None:
    """Half a bit for groups of 32."""
    only = {"smoothing_key": False, "smoothing_value": False}
    layer = QuantizedLayer(CacheConfig(nbits=2, group_size=group, scale_bits=8, residual_length=0, **only), 0)
    states = torch.randn(1, 2, 640, 64)
    layer.update(states, states)
    assert layer.memory().bits_per_element == 2 + bits


def test_a_block_that_does_not_fit_is_stored_in_16_bits_and_so_are_those_after_it() -> None:
    """What was stored before stays; how the tokens came makes no difference."""
    states = torch.randn(1, 1, 256, 16)
    states[:, :, 128:160] += 1000
    layers = []
    for parts in ((256,), (100, 100, 56)):
        layer = QuantizedLayer(CacheConfig(nbits=2, group_size_key=32, scale_bits=8, residual_length=0), 0)
        for part in states.split(parts, dim=2):
            layer.update(part, torch.zeros_like(part))
        layers.append(layer)
    pages = layers[0].stores[0].body.pages
    assert [(page.length, page.scale.dtype) for page in pages] == [(128, torch.uint8), (128, torch.float16)]
    assert torch.equal(layers[0].keys, layers[1].keys)
    assert (layers[0].keys - states).abs().max() < 3


def test_other_numbers_of_bits_are_refused() -> None:
    """By name, with what would work."""
    with pytest.raises(OptionValueError, match="scale_bits=4 cannot work: expected one of 8, 16"):
        CacheConfig(scale_bits=4)

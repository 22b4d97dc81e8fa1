"""The hqq backend: what hqq makes of a row that is alone."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from hqq.core.quantize import Quantizer as Library
from torch import Tensor
from transformers.cache_utils import HQQQuantizedLayer

from kvquant import QuantizedCache
from tests.unit.plugins.conftest import quantizer, read

WIDTHS = (1, 2, 3, 4, 8)


def library(rows: Tensor, nbits: int, *, optimize: bool) -> Tensor:
    """Dequantise what hqq makes of rows in one call."""
    codes, meta = Library.quantize(
        rows, nbits=nbits, axis=1, group_size=rows.shape[1], optimize=optimize, bitpack=False, device="cpu"
    )
    return (codes - meta["zero"]) * meta["scale"]


@pytest.mark.parametrize("nbits", WIDTHS)
def test_without_optimisation_states_are_hqq_s(nbits: int, random_rows: Tensor) -> None:
    """Plain min/max treats each row alone in the library too."""
    ours = read(quantizer("hqq", nbits, optimize=False).quantize(random_rows))
    torch.testing.assert_close(ours, library(random_rows, nbits, optimize=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nbits", WIDTHS)
def test_states_are_hqq_s_for_each_row_alone(nbits: int, random_rows: Tensor) -> None:
    """Row by row: the same steps to the last digit, so the same codes and the same stop."""
    result = quantizer("hqq", nbits).quantize(random_rows)
    parts = [
        Library.quantize(row, nbits=nbits, axis=1, group_size=64, optimize=True, bitpack=False, device="cpu")
        for row in random_rows.split(1)
    ]
    assert torch.equal(result.codes, torch.cat([codes for codes, _ in parts]).to(torch.uint8))
    theirs = torch.cat([(codes - meta["zero"]) * meta["scale"] for codes, meta in parts])
    torch.testing.assert_close(read(result), theirs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("nbits", [1, 4])
@pytest.mark.parametrize("group_size", [9, 32, 64, 100])
def test_no_number_of_threads_changes_a_bit(nbits: int, group_size: int) -> None:
    """torch shares a piece out among threads, and computes pow otherwise where a share ends within a vector."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(150_000 // group_size, group_size, generator=generator) * 2
    made = quantizer("hqq", nbits, group_size)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = made.quantize(rows)
        for threads in (2, 3, 4, 5, 7):
            torch.set_num_threads(threads)
            result = made.quantize(rows)
            assert torch.equal(result.codes, expected.codes)
            assert torch.equal(result.offset, expected.offset)
            alone = torch.cat([made.quantize(row).offset for row in rows[-50:].split(1)])
            assert torch.equal(alone, expected.offset[-50:])
    finally:
        torch.set_num_threads(before)


def test_hqq_itself_lets_neighbours_change_a_row(random_rows: Tensor) -> None:
    """Why the loop is ours. Should this fail, the library has learnt it and the loop can go."""
    together = library(random_rows, 2, optimize=True)
    alone = torch.cat([library(row, 2, optimize=True) for row in random_rows.split(1)])
    assert not torch.isclose(together, alone, rtol=1e-3, atol=1e-3).all(dim=1).float().mean() > 0.9


@pytest.mark.parametrize("nbits", WIDTHS)
def test_optimisation_lowers_the_error(nbits: int, random_rows: Tensor) -> None:
    """On by default, and better than min/max in the mean."""
    error = {
        optimize: (read(quantizer("hqq", nbits, **optimize_option).quantize(random_rows)) - random_rows).abs().mean()
        for optimize, optimize_option in ((True, {}), (False, {"optimize": False}))
    }
    assert error[True] < error[False]


@pytest.mark.parametrize("nbits", WIDTHS)
@pytest.mark.parametrize("power", [-90, -20, -10, 40, 90])
def test_min_max_is_within_half_a_step_at_any_magnitude(nbits: int, power: int, random_rows: Tensor) -> None:
    """hqq cuts scales off at absolute limits: 8 bits of rows narrower than 0.013 get fewer. Here they do not."""
    rows = random_rows * 2.0**power
    result = quantizer("hqq", nbits, optimize=False).quantize(rows)
    allowed = (rows.amax(1) - rows.amin(1)) / (2**nbits - 1) / 2 * 1.001
    assert ((read(result) - rows).abs().amax(1) <= allowed).all()


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_optimize_is_a_truth_value(value: object) -> None:
    """The message names the option, the value and what works."""
    with pytest.raises(ValueError, match=rf"^optimize={value!r} is not supported; supported: True, False$"):
        quantizer("hqq", 4, optimize=value)


def by_transformers(states: Tensor, nbits: int, axis: int, *, optimize: bool) -> Tensor:
    """Quantise and read back with transformers' layer, which gives hqq all states at once."""
    layer = HQQQuantizedLayer(nbits=nbits, axis_key=axis, axis_value=axis, q_group_size=32)
    layer.keys = states  # where it looks for type and device
    layer.quantizer = SimpleNamespace(
        quantize=functools.partial(Library.quantize, optimize=optimize),
        cuda=Library.cuda,
        dequantize=Library.dequantize,
    )
    return layer._dequantize(layer._quantize(states, axis))


def by_us(states: Tensor, nbits: int, axis: int, *, optimize: bool) -> Tensor:
    """Quantise and read back through the cache, under transformers' name for the axis."""
    cache = QuantizedCache(
        "hqq",
        nbits=nbits,
        axis_key=axis,
        axis_value=axis,
        group_size=32,
        smoothing_key=False,
        scale_bits=16,
        residual_length=0,
        options={"optimize": optimize},
    )
    cache.update(states, states, 0)
    return cache.layers[0].keys


@pytest.fixture
def states() -> Tensor:
    """Float32 ``[2, 3, 64, 64]``; one head has much larger numbers than the others, and one channel too."""
    states = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    states[:, 1] *= 20
    states[..., 5] *= 10
    return states


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])  # 3 bits on axis 1 transformers cannot read back
def test_axis_1_is_transformers(nbits: int, states: Tensor) -> None:
    """The same groups: equal without refinement, which looks at all groups in the library; with it, as good.

    But for what rounding scale and offset to float16 costs: up to a quarter of a step, and a little in the mean.
    """
    theirs, ours = (by(states, nbits, 1, optimize=False) for by in (by_transformers, by_us))
    steps = states.unflatten(3, (-1, 32))
    steps = ((steps.amax(-1) - steps.amin(-1)) / (2**nbits - 1)).repeat_interleave(32, dim=3)
    assert ((ours - theirs).abs() <= 0.25 * steps + 1e-6).all()

    theirs, ours = (by(states, nbits, 1, optimize=True) for by in (by_transformers, by_us))
    assert (ours - states).abs().mean() <= (theirs - states).abs().mean() * 1.03


def test_axis_0_is_not_transformers(states: Tensor) -> None:
    """transformers' groups take one number in many, of all heads; ours are consecutive tokens of a channel."""
    changed = states.clone()
    changed[0, 1, 3, 7] += 1000
    for by, reach in ((by_transformers, {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}), (by_us, {(0, 1)})):
        before, after = (by(given, 4, 0, optimize=False) for given in (states, changed))
        batch, head, token, channel = (before != after).nonzero().unbind(1)
        assert set(zip(batch.tolist(), head.tolist(), strict=True)) == reach
        assert set(channel.tolist()) == {7}
        assert (set(token.tolist()) <= set(range(32))) == (by is by_us)

    # A head with small numbers that shares scales with a head of large ones is lost.
    theirs, ours = (by(states, 2, 0, optimize=True)[:, 0] for by in (by_transformers, by_us))
    assert (ours - states[:, 0]).norm() / states[:, 0].norm() < 0.5
    assert (theirs - states[:, 0]).norm() / states[:, 0].norm() > 1

"""What each backend makes of the same states."""

from __future__ import annotations

import pytest
import torch

from kvquant.errors import BackendFactoryError, OptionValueError, UnknownBackendError, UnsupportedError
from kvquant.evaluation.distortion import (
    Distortion,
    DistortionOptions,
    Method,
    find_methods,
    gaussian_states,
    measure_distortion,
    outlier_states,
)


def measured(text: str, **shape: int) -> dict[Method, Distortion]:
    """Measure the methods in `text` on small states."""
    methods, left_out = find_methods(text, group_size=shape.get("group_size", 64))
    options = DistortionOptions(methods=methods, rounds=1, **{"tokens": 256, "heads": 2, **shape})
    report = measure_distortion(options, left_out, lambda _: None)
    return dict(zip(methods, report.results, strict=True))


def test_bits_count_codes_scales_and_offsets() -> None:
    """4 bits a code, and a scale and an offset of 16 bits for 64 numbers."""
    (result,) = measured("reference:4:channel").values()
    assert result.bits_per_element == 4 + 2 * 16 / 64
    (result,) = measured("reference:3:token", group_size=32).values()
    assert result.bits_per_element == 3 + 2 * 16 / 32


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_errors_are_relative_to_the_states(axis: str) -> None:
    """As computed here by min/max rounding, up to what float16 scales cost."""
    (result,) = measured(f"reference:4:{axis}").values()
    options = DistortionOptions(methods=(), tokens=256, heads=2)
    for states, error in (
        (gaussian_states(options), result.error_gaussian),
        (outlier_states(options), result.error_outliers),
    ):
        rows = states.transpose(2, 3).reshape(-1, 64) if axis == "channel" else states.reshape(-1, 64)
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        step = (high - low) / 15
        read = ((rows - low) / step).round() * step + low
        assert error == pytest.approx(float((read - rows).norm() / rows.norm()), rel=0.01)


def test_outlier_channels_are_few_large_and_the_same_for_all_tokens() -> None:
    """One in sixteen, ten to twenty times larger with a mean as large."""
    states = outlier_states(DistortionOptions(methods=(), tokens=2048, heads=3))
    size = states.square().mean(dim=2).sqrt()[0]
    large = size > 5
    assert (large.sum(dim=1) == 4).all()
    assert ((size[large] > 10) & (size[large] < 20 * 2**0.5 * 1.1)).all()
    assert ((size[~large] - 1).abs() < 0.1).all()


def test_keys_with_outlier_channels_want_the_channel_axis() -> None:
    """KIVI's finding, which the second error is there to show."""
    by_channel, by_token = measured("reference:2").values()
    assert (by_channel.axis, by_token.axis) == ("channel", "token")
    assert by_channel.error_outliers < by_token.error_outliers / 2
    assert by_channel.error_gaussian == pytest.approx(by_token.error_gaussian, rel=0.05)


def test_ratios_are_to_the_reference_with_the_same_bits_and_axis() -> None:
    """One for the reference itself, and none where it has no such line."""
    results = measured("reference:4:token,quanto:4:token,quanto:4:channel")
    reference, same, other = results.values()
    assert reference.quantise_ratio is not None
    assert reference.quantise_ratio.median == reference.dequantise_ratio.median == 1.0
    assert same.quantise_ratio is not None
    assert same.quantise_ratio.median == pytest.approx(same.quantise.median / reference.quantise.median)
    assert other.quantise_ratio is other.dequantise_ratio is None


def test_every_usable_backend_with_all_that_it_declares() -> None:
    """The yardstick first, in order of bits."""
    methods, left_out = find_methods()
    assert left_out == {}
    assert [method for method in methods if method.backend == "quanto"] == [
        Method("quanto", nbits, axis) for nbits in (2, 4, 8) for axis in ("channel", "token")
    ]
    assert methods[0] == Method("reference", 1, "channel")
    assert {method.backend for method in methods} >= {"reference", "hqq", "quanto", "bitsandbytes"}


def test_a_backend_that_cannot_be_used_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it was asked for by name."""
    monkeypatch.setenv("KVQUANT_BLOCK_BACKENDS", "hqq")
    methods, left_out = find_methods()
    assert "hqq" not in {method.backend for method in methods}
    assert left_out == {"kvquant:hqq": "the environment's KVQUANT_BLOCK_BACKENDS='hqq' names it"}
    with pytest.raises(ImportError, match="KVQUANT_BLOCK_BACKENDS"):
        find_methods("hqq:4")


def test_methods_are_written_short_or_in_full() -> None:
    """What is left open stands for all that is declared; the rest of the command line narrows it."""
    assert find_methods("kvquant:hqq:2:token:optimize=false")[0] == (Method("hqq", 2, "token", (("optimize", False),)),)
    assert len(find_methods("bitsandbytes")[0]) == 4
    assert [method.nbits for method in find_methods("reference,hqq", nbits=[4], axes=["token"])[0]] == [4, 4]
    assert Method("bitsandbytes", 4, "token", (("quant_type", "fp4"),)).label == "bitsandbytes quant_type=fp4"


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("refrence", UnknownBackendError, "Did you mean 'reference'"),
        ("quanto:3", UnsupportedError, "nbits=3 is not supported; supported: 2, 4, 8"),
        ("hqq:4:chanel", OptionValueError, "expected BACKEND[:NBITS][:AXIS][:OPTION=VALUE]"),
        ("hqq:4,hqq:4", OptionValueError, "each method once"),
    ],
)
def test_a_method_that_cannot_be_is_refused(text: str, error: type[Exception], says: str) -> None:
    """Naming what was written and what would work."""
    with pytest.raises(error) as caught:
        find_methods(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"tokens": 100}, "tokens=100 cannot work: expected a multiple of the group size, 64"),
        ({"head_dim": 80}, "head_dim=80 cannot work: expected a multiple of the group size, 64"),
        ({"rounds": 0}, "rounds=0 cannot work: expected at least 1"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(shape: dict[str, int], says: str) -> None:
    """Before anything is measured."""
    with pytest.raises(OptionValueError) as caught:
        DistortionOptions(methods=(), **shape)
    assert says in str(caught.value)


def test_a_bad_option_is_refused_before_anything_is_measured() -> None:
    """By the backend itself."""
    methods, _ = find_methods("reference:4,hqq:4:optimize=perhaps")
    turns: list[float] = []
    with pytest.raises(BackendFactoryError, match="optimize='perhaps' is not supported"):
        measure_distortion(DistortionOptions(methods=methods), {}, turns.append)
    assert turns == []


def test_progress_is_as_announced() -> None:
    """One turn for the quality of each method, and one a round for its speed."""
    methods, _ = find_methods("reference:4")
    turns: list[float] = []
    measure_distortion(DistortionOptions(methods=methods, tokens=64, rounds=2), {}, turns.append)
    assert turns == [1] * len(methods) * 3


def test_states_are_the_same_for_the_same_seed() -> None:
    """So that errors can be compared between runs."""
    options = DistortionOptions(methods=(), tokens=64)
    assert torch.equal(outlier_states(options), outlier_states(options))
    assert not torch.equal(gaussian_states(options), gaussian_states(DistortionOptions(methods=(), tokens=64, seed=1)))

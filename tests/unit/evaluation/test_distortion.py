"""What each backend makes of the same states."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator

import pytest
import torch

import kvquant
from kvquant.errors import BackendFactoryError, OptionValueError
from kvquant.evaluation import distortion
from kvquant.evaluation.distortion import Distortion, DistortionOptions, DistortionReport, measure_distortion
from kvquant.evaluation.measure import Spread
from kvquant.evaluation.methods import Method, find_methods
from kvquant.evaluation.synthetic import STATES
from kvquant.plugin import BackendSpec, Capabilities, QuantizedRows
from tests.support import FORMATS, MinMax, OpaqueMinMax


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds mean nothing at these sizes."""
    monkeypatch.setattr(distortion, "_TURN", 1e-6)


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    """Register a quantizer class as the backend ``tried``."""

    def register(factory: type, **capabilities: object) -> None:
        kvquant.register(BackendSpec("tried", factory, Capabilities(**{"nbits": (4,), **capabilities})))

    yield register
    kvquant.unregister("tried")


def report_on(text: str, **shape: int) -> DistortionReport:
    """Measure the methods in `text` on small states."""
    methods, left_out = find_methods(text, group_size=shape.get("group_size", 64))
    options = DistortionOptions(methods=methods, **{"rounds": 1, "tokens": 256, "heads": 2, **shape})
    return measure_distortion(options, left_out, lambda _: None)


def measured(text: str, **shape: int) -> dict[Method, Distortion]:
    """Return what was made of the methods in `text`, of which none may fail."""
    report = report_on(text, **shape)
    assert report.left_out == {}
    return dict(zip(report.options.methods, report.results, strict=True))


# ------------------------------------------------------------------------------------------------ bits


@pytest.mark.parametrize(("nbits", "group_size"), [(4, 64), (3, 32), (1, 16), (8, 64), (2, 64)])
def test_bits_count_codes_scales_and_offsets(nbits: int, group_size: int) -> None:
    """A code, and a share of a scale and an offset of 16 bits each; the same for both kinds of states."""
    for result in measured(f"reference:{nbits}", group_size=group_size).values():
        assert result.gaussian.bits_per_element == nbits + 2 * 16 / group_size
        assert result.outliers.bits_per_element == result.gaussian.bits_per_element


def test_bits_count_tables() -> None:
    """4 bits a code, a scale of 16 bits for 64 numbers, and 16 entries of 32 bits for all keys or all values."""
    numbers = 2 * 256 * 64
    for result in measured("bitsandbytes:4").values():
        assert result.gaussian.bits_per_element == 4 + 16 / 64 + 16 * 32 / numbers


def test_bits_of_wide_scales_are_counted_where_they_are_held(register: Callable[..., None]) -> None:
    """A backend whose scales float16 would harm on states with outlier channels pays for it there, and only there."""

    class NarrowAroundOutliers(MinMax):
        def grid(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            numbers, scale, low = super().grid(rows)
            return numbers, torch.where(low.abs() > 9, scale / 1e6, scale), low

    register(NarrowAroundOutliers)
    (result,) = measured("tried:4:channel").values()
    assert result.gaussian.bits_per_element == 4.5
    assert result.outliers.bits_per_element > 4.5


def test_an_opaque_format_pays_for_what_it_holds(register: Callable[..., None]) -> None:
    """Codes of 4 bits, and scale and offset in float32 as the backend keeps them."""
    register(OpaqueMinMax, formats=("opaque",))
    for result in measured("tried:4").values():
        assert result.gaussian.bits_per_element == 4 + 2 * 32 / 64


# ------------------------------------------------------------------------------------------------ error


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("nbits", [2, 4])
@pytest.mark.parametrize("kind", STATES)
def test_errors_are_relative_to_the_states(axis: str, nbits: int, kind: str) -> None:
    """As computed here by min/max rounding, up to what float16 scales cost."""
    (result,) = measured(f"reference:{nbits}:{axis}:scale=range").values()
    states = STATES[kind](2, 256, 64, 0)
    rows = states.transpose(2, 3).reshape(-1, 64) if axis == "channel" else states.reshape(-1, 64)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = (high - low) / (2**nbits - 1)
    read = ((rows - low) / step).round() * step + low
    assert getattr(result, kind).error == pytest.approx(float((read - rows).norm() / rows.norm()), rel=0.002)


def test_the_error_of_uniform_rounding_is_that_of_the_theory() -> None:
    """A twelfth of the squared step, whose size the range of 64 normal numbers gives: 4.7 deviations on average."""
    (result,) = measured("reference:8:token", tokens=2048).values()
    assert result.gaussian.error == pytest.approx(4.7 / 255 / 12**0.5, rel=0.03)


@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_no_token_escapes(group_size: int) -> None:
    """All are quantised on either axis, so both have about the same error and the same bits on Gaussian states."""
    by_channel, by_token = measured("reference:2", group_size=group_size, tokens=64, heads=8).values()
    assert by_token.gaussian.bits_per_element == by_channel.gaussian.bits_per_element == 2 + 32 / group_size
    assert by_token.gaussian.error == pytest.approx(by_channel.gaussian.error, rel=0.05)


def test_keys_with_outlier_channels_want_the_channel_axis() -> None:
    """KIVI's finding, which the second error is there to show."""
    by_channel, by_token = measured("reference:2:scale=range").values()
    assert (by_channel.axis, by_token.axis) == ("channel", "token")
    assert by_channel.outliers.error < by_token.outliers.error / 2


def test_methods_with_options_are_methods_of_their_own() -> None:
    """NormalFloat beats 4-bit floats on Gaussian states, which it was made for."""
    normal, floating = measured("bitsandbytes:4:token,bitsandbytes:4:token:quant_type=fp4").values()
    assert normal.gaussian.error < 0.9 * floating.gaussian.error
    assert floating.options == {"quant_type": "fp4"}


# ------------------------------------------------------------------------------------------------ speed


def test_ratios_are_to_the_reference_with_the_same_bits_and_axis() -> None:
    """One for the reference itself, and none where it has no such line."""
    reference, same, other = measured("reference:4:token,quanto:4:token,quanto:4:channel", rounds=3).values()
    assert reference.quantise_ratio == reference.dequantise_ratio == Spread(1.0, 1.0, 1.0, 3)
    assert same.quantise_ratio is not None
    assert same.quantise_ratio.count == same.quantise.count == 3
    assert other.quantise_ratio is other.dequantise_ratio is None


def test_the_reference_with_options_is_compared_with_the_plain_one() -> None:
    """In whatever order they are named."""
    plain, fitted = measured("reference:2:token,reference:2:token:scale=error", rounds=3).values()
    assert plain.quantise_ratio == Spread(1.0, 1.0, 1.0, 3)
    assert fitted.quantise_ratio is not None
    assert fitted.quantise_ratio != plain.quantise_ratio
    (alone,) = measured("reference:2:token:scale=error").values()
    assert alone.quantise_ratio is None


def test_ratios_are_paired_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round in which everything takes ten times as long changes speeds and leaves ratios alone."""
    given = {"reference": iter([1.0, 2.0, 10.0, 20.0]), "quanto": iter([2.0, 4.0, 20.0, 40.0])}

    def take(method: Method, options: object, states: object, made: distortion._Measured) -> None:
        made.quantise.append(next(given[method.backend]))
        made.dequantise.append(next(given[method.backend]))

    monkeypatch.setattr(distortion, "_take_times", take)
    _, quanto = measured("reference:4:token,quanto:4:token", rounds=2).values()
    assert quanto.quantise_ratio == quanto.dequantise_ratio == Spread(0.5, 0.5, 0.5, 2)
    numbers = 2 * 2 * 256 * 64  # keys and values
    assert (quanto.quantise.high, quanto.quantise.low) == (numbers / 2, numbers / 20)


def test_turns_of_the_same_bits_and_axis_are_close_and_change_direction() -> None:
    """What is compared meets the same load, and none is always first."""
    methods, _ = find_methods("reference:2,reference:4,hqq:4,hqq:2")
    there, back = (distortion._turns(methods, number) for number in (0, 1))
    assert [(methods[index].nbits, methods[index].axis, methods[index].backend) for index in there] == [
        (nbits, axis, backend) for nbits in (2, 4) for axis in ("channel", "token") for backend in ("reference", "hqq")
    ]
    assert back == there[::-1]


def test_a_turn_is_filled_with_calls_on_fresh_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, in cold memory, does not count unless it fills the turn alone; the median does."""
    monkeypatch.setattr(distortion, "_TURN", 3.0)
    prepared: list[int] = []

    def typical(*taken: float) -> tuple[float, int]:
        times = iter(taken)
        monkeypatch.setattr(distortion, "seconds", lambda work, device: (work(), next(times))[1])
        prepared.clear()
        return distortion._typical(lambda: prepared.append(0), lambda _: None, torch.device("cpu")), len(prepared)

    assert typical(2.0, 1.0, 1.5, 1.0) == (1.0, 4)
    assert typical(9.0) == (9.0, 1)


# ------------------------------------------------------------------------------------------------ the whole


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"tokens": 100}, "tokens=100 cannot work: expected a multiple of 64, which are quantised at once"),
        ({"tokens": 48, "group_size": 16}, "tokens=48 cannot work: expected a multiple of 32"),
        ({"tokens": 48, "group_size": 24}, "tokens=48 cannot work: expected a multiple of 96"),
        ({"head_dim": 80}, "head_dim=80 cannot work: expected a multiple of the group size, 64"),
        ({"rounds": 0}, "rounds=0 cannot work: expected at least 1"),
        ({"threads": 0}, "threads=0 cannot work: expected at least 1, or None for torch's choice"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(shape: dict[str, int], says: str) -> None:
    """Before anything is measured: a token left in the window would have no error."""
    methods, _ = find_methods("reference:4")
    with pytest.raises(OptionValueError) as caught:
        DistortionOptions(methods=methods, **shape)
    assert says in str(caught.value)


def test_what_only_one_axis_needs_the_other_does_not() -> None:
    """Heads of 80 channels have groups of 64 tokens."""
    (result,) = measured("reference:4:channel", head_dim=80).values()
    assert result.gaussian.bits_per_element == 4.5


def test_a_bad_option_is_refused_before_anything_is_measured() -> None:
    """By the backend itself."""
    methods, _ = find_methods("reference:4,hqq:4:optimize=perhaps")
    turns: list[float] = []
    with pytest.raises(BackendFactoryError, match="optimize='perhaps' is not supported"):
        measure_distortion(DistortionOptions(methods=methods), {}, turns.append)
    assert turns == []


def test_a_backend_that_fails_does_not_stop_the_others(register: Callable[..., None]) -> None:
    """It is reported with the reason: once if all of it fails alike, else each method by name."""

    class FailsWithFewBits(MinMax):
        def quantize(self, rows: torch.Tensor) -> QuantizedRows:
            if self.levels == 3:
                raise RuntimeError("too few bits for me")
            return super().quantize(rows)

    register(FailsWithFewBits, nbits=(2, 4))
    report = report_on("reference:4:token,tried:2,tried:4:token")
    assert [result.backend for result in report.results] == ["reference", "tried"]
    assert list(report.left_out) == ["tried:2:channel", "tried:2:token"]
    assert "too few bits for me" in report.left_out["tried:2:token"]
    report = report_on("reference:4:token,tried:2")
    assert list(report.left_out) == ["tried"]


def test_a_library_that_does_not_load_does_not_stop_the_others(register: Callable[..., None]) -> None:
    """Backends are asked for a quantizer when their turn comes."""

    class NoLibrary:
        def __init__(self, scheme: object) -> None:
            raise ImportError("libmagic.so: cannot open shared object file")

    register(NoLibrary)
    report = report_on("reference:4,tried:4")
    assert len(report.results) == 2
    assert "libmagic.so" in report.left_out["tried"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_can_be_measured(register: Callable[..., None], kind: str) -> None:
    """A plugin's too."""
    nbits, most = (3, 0.3) if kind == "trellis" else (4, 0.2)  # a trellis has no more
    register(FORMATS[kind], formats=(kind,), nbits=(nbits,))
    for result in measured(f"tried:{nbits}").values():
        assert 0.05 < result.gaussian.error < most
        assert result.dequantise.low > 0


def test_a_report_is_json() -> None:
    """With what it depends on: the machine, versions, states and methods."""
    report = json.loads(json.dumps(report_on("reference:4:token,hqq:4:token:optimize=false").to_dict()))
    assert set(report) == {"machine", "libraries", "options", "results", "left_out"}
    assert {"cpu", "cores", "threads", "load", "torch", "kvquant"} <= set(report["machine"])
    assert set(report["libraries"]) == {"hqq"}
    assert report["options"]["seed"] == 0
    assert report["options"]["methods"][1]["options"] == [["optimize", False]]
    result = report["results"][1]
    assert (result["backend"], result["nbits"], result["axis"]) == ("hqq", 4, "token")
    assert result["options"] == {"optimize": False}
    assert set(result["gaussian"]) == set(result["outliers"]) == {"bits_per_element", "error"}
    for speed in ("quantise", "dequantise", "quantise_ratio", "dequantise_ratio"):
        assert set(result[speed]) == {"median", "low", "high", "count"}


def test_a_plugin_s_own_version_is_reported(register: Callable[..., None]) -> None:
    """One registered here has none; libraries that others need have theirs."""
    register(MinMax)
    assert set(report_on("tried:4,quanto:4").libraries) == {"optimum-quanto"}


def test_progress_is_as_announced() -> None:
    """One turn for the quality of each method, and one a round for its speed."""
    methods, _ = find_methods("reference:4")
    options, turns = DistortionOptions(methods=methods, tokens=64, rounds=2), list[float]()
    measure_distortion(options, {}, turns.append)
    assert sum(turns) == options.work == len(methods) * 3


def test_threads_and_garbage_collection_are_the_caller_s_again() -> None:
    """They belong to the process."""
    methods, _ = find_methods("reference:4:token")
    before = torch.get_num_threads()
    report = measure_distortion(
        DistortionOptions(methods=methods, tokens=64, rounds=1, threads=before + 1), {}, lambda _: None
    )
    assert report.machine["threads"] == before + 1
    assert torch.get_num_threads() == before
    assert gc.isenabled()

"""Rate and distortion of caches, and the bound that neither can cross."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Cache

from kvquant.cache.cache import QuantizedCache
from kvquant.errors import OptionValueError, OutOfMemoryError
from kvquant.evaluation import rate_distortion
from kvquant.evaluation.candidates import Candidate, parse_candidates
from kvquant.evaluation.journal import Journal
from kvquant.evaluation.rate_distortion import (
    RateDistortionOptions,
    RateDistortionReport,
    bound_curve,
    bound_rate,
    every_backend,
    measure_rate_distortion,
)
from kvquant.evaluation.synthetic import outlier_states
from tests.plugins.on_path import plugins_on_path
from tests.support import MinMax

#: All as at 4 bits and above, where the core does nothing of its own.
PLAIN = {"smoothing_key": False, "smoothing_value": False, "scale_bits": 16}

spreads = st.lists(st.floats(0.01, 400), min_size=1, max_size=20).map(lambda found: torch.tensor(found).double())


def measured(backends: str, **others: object) -> RateDistortionReport:
    chosen = {"candidates": parse_candidates(backends, PLAIN), "tokens": 512, "heads": 2, **others}
    options = RateDistortionOptions(**chosen)
    with Journal(None, options.settings()) as journal:
        return measure_rate_distortion(options, journal)


@given(distortion=st.floats(1e-9, 0.999), channels=st.integers(1, 9), variance=st.floats(0.1, 100))
def test_the_bound_of_channels_alike_is_half_the_logarithm(distortion: float, channels: int, variance: float) -> None:
    """D = 2**(-2 R), whatever the variance; no bits at all leave all of it."""
    variances = torch.full((channels,), variance)
    assert bound_rate(distortion, variances) == pytest.approx(math.log2(1 / distortion) / 2, abs=1e-6)
    assert bound_rate(1.0 + distortion, variances) == 0


@given(variances=spreads)
def test_points_of_the_curve_are_on_the_bound(variances: torch.Tensor) -> None:
    """Found from the level there, and from the distortion here."""
    curve = bound_curve(variances)
    assert curve[0] == (pytest.approx(0), pytest.approx(1))
    for rate, distortion in curve[1::7]:
        assert bound_rate(distortion, variances) == pytest.approx(rate, abs=1e-6)


def test_a_channel_without_variance_takes_no_bits() -> None:
    """The bound is that of the others, for each of which there are more bits."""
    some, every = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    for (rate, error), (less, same) in zip(bound_curve(some), bound_curve(every), strict=True):
        assert (less, same) == (pytest.approx(rate / 2), pytest.approx(error))
        assert bound_rate(same, every) == pytest.approx(less, abs=1e-6)


@given(data=st.data(), variances=spreads)
def test_no_division_of_bits_among_channels_is_better(data: st.DataObject, variances: torch.Tensor) -> None:
    """Each channel at its own bound, with any bits of its own."""
    bits = data.draw(st.lists(st.floats(0, 8), min_size=len(variances), max_size=len(variances)))
    rates = torch.tensor(bits, dtype=torch.float64)
    distortion = float((variances * 2 ** (-2 * rates)).mean() / variances.mean())
    assert bound_rate(distortion, variances) <= float(rates.mean()) + 1e-9


def test_each_stream_has_its_own_rate_and_its_own_error() -> None:
    """Bits and axis are those of the stream; the error is that of the quantised tokens, and of no exact one."""
    report = measured("reference:4:nbits_value=2:group_size=32:sink_length=7:residual_length=40", states=("outliers",))
    key, value = report.rows
    assert (key.stream, key.axis, key.bits_per_element) == ("key", "channel", 5.0)
    assert (value.stream, value.axis, value.bits_per_element) == ("value", "token", 3.0)
    states = outlier_states(2, 512, 64, 0)
    cache = QuantizedCache(
        "reference", nbits=4, nbits_value=2, group_size=32, sink_length=7, residual_length=40, **PLAIN
    )
    cache.update(states, states, 0)
    wrong = (cache.layers[0].values - states).double()
    body = wrong.abs().amax(dim=(0, 1, 3)) > 0
    assert int(body.sum()) == 448
    expected = float(wrong[:, :, body].square().mean() / states.double().var(dim=2).mean())
    assert value.distortion == pytest.approx(expected)
    assert value.snr == pytest.approx(-10 * math.log10(expected))
    assert value.gap == value.bits_per_element - value.bound


def test_nothing_is_below_the_bound() -> None:
    """No backend and no width; more bits, less error."""
    candidates, left_out = every_backend(PLAIN)
    assert left_out == {}
    assert {"lloydmax:1", "lloydmax:4", "reference:8", "hqq:3"} <= {candidate.label for candidate in candidates}
    report = measured("full", candidates=candidates)
    assert len(report.rows) == 4 * len(candidates)
    assert min(row.gap for row in report.rows) > 0
    two, four = (
        next(row for row in report.rows if row.cache == f"lloydmax:{nbits}" and row.states == "gaussian")
        for nbits in (2, 4)
    )
    assert two.bits_per_element == pytest.approx(2.25, abs=0.01)  # and a table, which weighs something here
    assert two.distortion == pytest.approx(0.1115, rel=0.05)
    assert two.snr + 10 < four.snr


def test_transformers_own_cache_stands_beside() -> None:
    """Its integers say the axis, so none is named."""
    rows = measured("full,transformers:quanto:4", states=("gaussian",)).rows
    assert [(row.cache, row.stream, row.axis) for row in rows] == [
        ("transformers:quanto:4", "key", None),
        ("transformers:quanto:4", "value", None),
    ]
    assert all(0 < row.gap < 2.5 for row in rows)


def test_a_cache_that_fails_is_left_out_with_its_reason(backend: Callable[..., str]) -> None:
    """The others are measured all the same."""

    class Fails(MinMax):
        def quantize(self, rows: torch.Tensor) -> None:
            raise RuntimeError("no luck today")

    name = backend(Fails)
    report = measured(f"{name}:4,reference:4")
    assert {row.cache for row in report.rows} == {"reference:4"}
    assert "no luck today" in report.left_out[f"{name}:4"]


@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError])
def test_whatever_a_plugin_raises_is_its_problem(
    error: type[Exception], backend: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the core does not look: while states are read, or a cache is made."""
    name = backend(MinMax)
    make = rate_distortion._empty

    def fails(candidate: Candidate, given: torch.Tensor) -> Cache:
        if candidate.label.startswith(name):
            raise error("no luck today")
        return make(candidate, given)

    monkeypatch.setattr(rate_distortion, "_empty", fails)
    report = measured(f"{name}:4,reference:4")
    assert report.left_out == {f"{name}:4": "no luck today"}
    assert len(report.rows) == 4


def test_a_backend_that_runs_out_of_memory_stops_the_run(backend: Callable[..., str]) -> None:
    """It is no problem of the backend's, and the same command goes on there."""

    class Greedy(MinMax):
        def quantize(self, rows: torch.Tensor) -> None:
            raise MemoryError

    with pytest.raises(OutOfMemoryError, match="fewer --tokens or --heads"):
        measured(f"{backend(Greedy)}:4,reference:4")


def test_a_cache_that_quantises_nothing_is_left_out_with_what_would_help() -> None:
    """The others are measured all the same."""
    report = measured("reference:4,reference:2:residual_length=0", tokens=100, states=("gaussian",))
    assert {row.cache for row in report.rows} == {"reference:2:residual_length=0"}
    assert report.left_out == {
        "reference:4": "it quantises none of 100 tokens: more --tokens, or a shorter window",
    }


def test_a_journal_knows_the_plugin_s_version() -> None:
    """Results of another version are not mixed with those of this one."""
    with plugins_on_path("good"):
        caches = parse_candidates('reference:4:layers={"0":{"backend":"good","group_size":32}}')
        versions = RateDistortionOptions(candidates=caches).settings()["versions"]
    assert versions["kvquant-good"] == "1.2"
    assert "pluggy" in versions


def test_a_journal_gives_the_same_again() -> None:
    """Nothing depends on what was measured before it."""
    both, alone = measured("reference:2,hqq:2"), measured("hqq:2")
    assert [row for row in both.rows if row.cache == "hqq:2"] == list(alone.rows)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"states": ("gauss",)}, "states='gauss' cannot work: expected one or more of gaussian, outliers, each once"),
        ({"streams": ("key", "key")}, "streams='key,key' cannot work"),
        ({"heads": 0}, "heads=0 cannot work: expected at least 1"),
        ({"tokens": 1}, "tokens=1 cannot work: expected at least 2"),
    ],
)
def test_what_cannot_work_is_refused(others: dict[str, object], message: str) -> None:
    """With the option, the value and what would work."""
    with pytest.raises(OptionValueError, match=message):
        measured("reference:4", **others)

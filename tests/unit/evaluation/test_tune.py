"""Tuning: the integer program against all assignments, and what is measured, planned and written around it."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from kvquant.cache.cache import QuantizedCache
from kvquant.demo import HELDOUT_FILE, MODEL_DIR
from kvquant.engine.config import PRESETS, CacheConfig
from kvquant.engine.settings import layer_settings
from kvquant.errors import OptionValueError, OutOfMemoryError, UnsupportedError
from kvquant.evaluation.candidates import body_bits
from kvquant.evaluation.intervals import Estimate
from kvquant.evaluation.journal import Journal
from kvquant.evaluation.loading import load_model
from kvquant.evaluation.perplexity import cut
from kvquant.evaluation.planning.model import model_shape
from kvquant.evaluation.planning.sizes import cache_sizes
from kvquant.evaluation.teacher import forced_logits
from kvquant.evaluation.tuning import tune as tuning
from kvquant.evaluation.tuning.assignment import ROUNDING, Costs, mean_bits, solve, trade_off
from kvquant.evaluation.tuning.budget import Memory, memory_budget, said_budget
from kvquant.evaluation.tuning.report import numbers_line, ratio_text, verdict
from kvquant.evaluation.tuning.sensitivity import stored_bits
from kvquant.evaluation.tuning.space import Stream, find_space, parse_widths, tuning_options
from kvquant.evaluation.tuning.text import split
from kvquant.evaluation.tuning.tune import TuneOptions
from tests.unit.evaluation import measured

#: At every width as at 4 bits, so that bits are easily told.
BASE = "reference:residual_length=32:smoothing_key=false:smoothing_value=false:scale_bits=16:scale=range"
WIDTHS = (1, 2, 4, 8)

# ------------------------------------------------------------------------------------------------ the solver


@st.composite
def costs(draw: st.DrawFn) -> Costs:
    """A few streams of some sizes; as measured, divergences need neither fall nor be positive."""
    streams, widths = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    sizes = np.array(draw(st.lists(st.integers(1, 4), min_size=streams, max_size=streams)), dtype=float)
    rising = np.cumsum(draw(grid(streams, widths, st.integers(1, 9))), axis=1) / 4
    added = np.array(draw(grid(streams, widths, st.integers(-3, 1000)))) / draw(st.sampled_from([1.0, 1e5]))
    return Costs(sizes / sizes.sum(), rising, added)


def grid(rows: int, columns: int, numbers: st.SearchStrategy[int]) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(numbers, min_size=columns, max_size=columns), min_size=rows, max_size=rows)


@settings(max_examples=60)
@given(costs=costs(), at=st.floats(0, 1))
def test_no_assignment_within_the_budget_is_better(costs: Costs, at: float) -> None:
    """All of them tried; and the one found is within the budget."""
    low, high = mean_bits(costs.shares, costs.bits)
    budget = low + at * (high - low)
    found = solve(costs, budget)
    assert found.bits <= budget + ROUNDING
    streams, widths = costs.bits.shape
    every = (costs.solution(choice) for choice in itertools.product(range(widths), repeat=streams))
    best = min(one.added for one in every if one.bits <= budget + ROUNDING)
    assert found.added == pytest.approx(best, abs=1e-9 * np.abs(costs.added).max() * streams)


@settings(max_examples=20)
@given(costs=costs())
def test_more_bits_are_never_worse(costs: Costs) -> None:
    """Along the curve, whose first point has the fewest bits; one width everywhere is never below it."""
    curve = trade_off(costs, 9)
    added = [one.added for one in curve]
    assert added == sorted(added, reverse=True)
    low, _ = mean_bits(costs.shares, costs.bits)
    assert curve[0].bits == pytest.approx(low)
    streams, widths = costs.bits.shape
    for width in range(widths):
        uniform = costs.solution((width,) * streams)
        assert solve(costs, uniform.bits).added <= uniform.added + 1e-9


def test_a_budget_is_kept_where_the_solver_takes_little_for_nothing() -> None:
    """The better assignment is over the budget by less than the solver's tolerance."""
    found = Costs(np.array([1.0]), np.array([[1.0, 2.0 + 5e-7]]), np.array([[1.0, 0.0]]))
    assert solve(found, 2.0).choice == (0,)
    with pytest.raises(ValueError, match=r"no assignment has 0\.5 bits"):
        solve(found, 0.5)


# ------------------------------------------------------------------------------------------------ the choices


def model_config(layers: int = 4) -> PreTrainedConfig:
    return PreTrainedConfig(
        num_hidden_layers=layers, hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64
    )


@given(widths=st.lists(st.tuples(*[st.sampled_from(WIDTHS)] * 2), min_size=1, max_size=9))
def test_a_config_gives_every_layer_its_widths(widths: list[tuple[int, int]]) -> None:
    """Through YAML and JSON, whatever they are, and layers that are alike stand together."""
    space = find_space(tuning_options(BASE), WIDTHS, model_config(len(widths)))
    assignment = {
        Stream(at, name): pair[name == "value"] for at, pair in enumerate(widths) for name in ("key", "value")
    }
    config = CacheConfig.from_dict(space.config(assignment))
    for read in (CacheConfig.from_yaml(config.to_yaml()), CacheConfig.from_json(config.to_json())):
        made = [layer_settings(read, layer) for layer in range(len(widths))]
        assert [(one.key.nbits, one.value.nbits) for one in made] == widths
        assert all(one.key.options == {"scale": "range"} and one.residual_length == 32 for one in made)
    assert len(config.layers) == len(set(widths)) - 1


def test_the_widths_are_those_that_the_backend_has() -> None:
    """All of them unless some are named; layers in full precision are left out."""
    space = find_space(tuning_options("quanto:skip_layers=[0,-1]"), None, model_config())
    assert (space.widths, space.widest, space.layers) == ((2, 4, 8), 8, (1, 2))
    fewer = find_space(tuning_options("balanced"), parse_widths("2, 4"), model_config())
    assert (fewer.widths, fewer.widest, fewer.layers) == ((2, 4), 8, (0, 1, 2, 3))
    assert fewer.options["sink_length"] == 4
    everything = find_space(tuning_options("reference"), None, model_config())
    assert everything.widths == (1, 2, 3, 4, 8)  # whole ones
    mixed = find_space(tuning_options("reference"), parse_widths("2,2.5"), model_config())
    assert mixed.widths == (2, 2.5)
    with pytest.raises(OptionValueError, match=r"widths=3 .* widths that quanto has with these options: 2, 4, 8"):
        find_space(tuning_options("quanto"), (2, 3), model_config())
    with pytest.raises(UnsupportedError, match="none of its layers is quantised"):
        find_space(tuning_options("reference:skip_layers=[0]"), None, model_config(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reference:4", "a cache without bits"),
        ("reference:nbits_key=4", "a cache without bits"),
        ("reference,hqq", "one backend of kvquant"),
        ("full", "one backend of kvquant"),
        (" full", "one backend of kvquant"),
        ("transformers:quanto", "a cache of kvquant's"),
        ('reference:layers={"0":{"group_size":32}}', "layers={.*expected none: options by layer are what"),
    ],
)
def test_what_cannot_be_tuned_is_refused(text: str, message: str) -> None:
    """One cache of kvquant's, without bits and without options by layer."""
    with pytest.raises(OptionValueError, match=message):
        tuning_options(text)


def test_what_is_said_of_all_caches_goes_before_the_default() -> None:
    """And not before what a user says of this one."""
    shared = {"group_size": 32, "axis_key": None, "residual_length": 16}
    options = tuning_options(None, shared)
    assert (options["group_size"], options["residual_length"], options["axis_key"]) == (32, 16, "channel")
    assert (options["sink_length"], options["options"]) == (4, {"scale": "fourth"})
    assert not {"nbits", "nbits_key", "nbits_value"} & set(options)
    assert tuning_options("smallest", shared)["group_size"] == PRESETS["smallest"]["group_size"]
    with pytest.raises(OptionValueError, match="group_size=0 cannot work"):
        tuning_options(None, {"group_size": 0})


@pytest.mark.parametrize("text", ["", "2", "2,2", "1,x", "0,2", "-1,2"])
def test_widths_are_two_numbers_at_least(text: str) -> None:
    """Separated by commas."""
    with pytest.raises(OptionValueError, match="at least two widths"):
        parse_widths(text)


def test_widths_may_be_fractions() -> None:
    """Whole ones are whole numbers, as options have them."""
    assert parse_widths("4,1.5,2") == (1.5, 2, 4)
    assert [type(width) for width in parse_widths("4,1.5,2")] == [float, int, int]


# ------------------------------------------------------------------------------------------------ text and budget


@given(
    length=st.integers(4, 60),
    share=st.floats(0, 1),
    tune=st.integers(1, 4),
    verify=st.integers(2, 5),
    prefix=st.integers(0, 1),
)
def test_the_text_that_verifies_is_held_out(length: int, share: float, tune: int, verify: int, prefix: int) -> None:
    """The two parts have no token in common, and one token less than is asked for is too few."""
    prefill = max(1 + prefix, min(length - 1, int(share * length)))
    shape = {"prefix": [-1] * prefix, "length": length, "prefill": prefill, "tune": tune, "verify": verify}
    first, second = split(range(2000), **shape)
    assert len(first.tokens) == tune
    assert 2 <= len(second.tokens) <= verify
    assert second.first > first.numbers[-1]
    held = [set(part.tokens[:, prefix:].flatten().tolist()) for part in (first, second)]
    assert not held[0] & held[1]
    with pytest.raises(OptionValueError) as caught:
        split([], **shape)
    needed = int(caught.value.expected.split()[2])
    assert len(split(range(needed), **shape)[1].tokens) == 2
    with pytest.raises(OptionValueError, match=f"at least {needed} tokens"):
        split(range(needed - 1), **shape)


@functools.cache
def demo():
    loaded = load_model()
    return loaded, loaded.encode(HELDOUT_FILE.read_text("utf-8"))[:1200]


@functools.cache
def stored(base: str | None = BASE, *, tables: bool = True):
    loaded, text = demo()
    space = find_space(tuning_options(base), (1, 2, 4), loaded.model.config)
    window = cut(text, loaded.prefix, 512, 256, 1).tokens[:, :512]
    return space, stored_bits(loaded, space, window, 256, tables=tables)


def test_bits_are_those_of_the_caches_themselves() -> None:
    """Stream by stream, and the mean over all of them."""
    space, found = stored()
    assert found.bits.shape == (len(space.streams), 3)
    assert found.bits.tolist() == [[1.5, 2.5, 4.5]] * len(space.streams)
    assert np.ptp(found.numbers) == 0


@pytest.mark.parametrize("base", [None, "reference", "lloydmax:residual_length=32"])
def test_a_budget_is_of_what_a_whole_window_stores(base: str | None) -> None:
    """Tables are there once, however many tokens there are: what is predicted is what the cache has in the end."""
    loaded, text = demo()
    space, found = stored(base)
    shares = found.numbers / found.numbers.sum()
    window = cut(text, loaded.prefix, 512, 256, 1).tokens[:, :512]
    for at, width in enumerate(space.widths):
        cache = space.candidate(space.uniform(width, width)).make(loaded.model.config)
        for _ in forced_logits(loaded.model, cache, window, 256):
            pass
        assert shares @ found.bits[:, at] == pytest.approx(body_bits(cache), rel=1e-9)


@pytest.mark.parametrize("budget", [1.4, 4.6])
def test_a_budget_that_no_assignment_meets_is_refused(budget: float) -> None:
    """With what would work."""
    with pytest.raises(
        OptionValueError, match=r"expected 1\.5 to 4\.5 bits per element: 1-bit codes everywhere take 1\.5"
    ):
        said_budget(budget, *stored())


def test_the_bounds_of_a_budget_are_kept_as_they_are_shown() -> None:
    """Rounded inwards: who takes the least that is named is not refused."""
    space, found = stored()
    odd = dataclasses.replace(found, bits=found.bits + 0.00049)
    for at, text in ((0, "1.501"), (2, "4.5")):
        with pytest.raises(OptionValueError) as caught:
            said_budget(9.0, space, odd)
        assert caught.value.expected.split()[at] == text
        assert said_budget(float(text), space, odd).bits == float(text)


def test_where_no_uniform_cache_is_within_the_budget_there_is_none_to_compare_with() -> None:
    """A width may take least in one stream, and more than another elsewhere."""
    space = find_space(tuning_options(BASE), (1, 2), model_config(1))
    costs = Costs(np.array([0.5, 0.5]), np.array([[1.0, 3.0], [3.0, 1.0]]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert solve(costs, 1.0).choice == (0, 1)
    assert tuning._rivals(space, costs, 1.0) == {}
    report = measured.tune()
    alone = dataclasses.replace(report, rows=report.rows[:1])
    assert verdict(alone).startswith("No cache with one width everywhere is within the budget")


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.5, "0.5"), (0.9996, "0.9996"), (1.0004, "1.0004"), (1.0, "1"), (0.99999994, "0.9999999")]
)
def test_a_ratio_is_seen_to_be_on_its_side_of_one(ratio: float, text: str) -> None:
    """As the verdict takes it, which is about the numbers and not what is shown of them."""
    assert ratio_text(Estimate(0.9, 0.8, ratio)) == f"0.9 (0.8, {text})"


def test_what_needs_less_memory_is_said_in_the_command_s_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its windows are as long as --length."""
    loaded, text = demo()
    options = TuneOptions(
        base=tuning_options(BASE), widths=(1, 2), budget=2, length=192, prefill=128, windows=1, verify=2
    )
    prepared = tuning.prepare(loaded, text, options)

    def too_much(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("kvquant.evaluation.perplexity._Window.score", too_much)
    with (
        Journal(None, tuning.run_settings(loaded, text, options, prepared.space)) as journal,
        pytest.raises(OutOfMemoryError, match=r"What needs less: a shorter --length, a longer --prefill"),
    ):
        tuning.tune(loaded, prepared, options, journal)


@pytest.mark.parametrize("context", [300, 2000])
@pytest.mark.parametrize(("base", "bits"), [(BASE, 2.5), (None, 2.25)])
def test_what_memory_leaves_is_what_the_plan_says(base: str | None, bits: float, context: int) -> None:
    """The best assignment that it allows fits, one more bit for one stream does not; whatever smooths channels."""
    space, found = stored(base, tables=False)
    model = model_shape(str(MODEL_DIR), dtype="float32", batch=2)
    uniform = space.candidate(space.uniform(2, 2))
    needed = cache_sizes(uniform, model, 256 if context > 256 else 1, torch.device("cpu")).most(context)
    memory = Memory(model, model.weights.nbytes + needed + 1000, context, overhead=1000)
    budget = memory_budget(memory, space, found)
    assert budget.bits == pytest.approx(bits, rel=0.01)
    costs = Costs(budget.shares, found.bits, -np.arange(3.0) * np.ones((len(space.streams), 1)))
    choice = solve(costs, budget.bits).choice
    best = {stream: space.widths[at] for stream, at in zip(space.streams, choice, strict=True)}
    assert memory.takes(space, best) <= memory.free
    assert memory.takes(space, space.uniform(2, 2)) <= memory.free
    more = space.alone(space.streams[0], 4) | dict.fromkeys(space.streams[1:], 2)
    assert memory.takes(space, more) > memory.free
    assert budget.describe()["memory"] == memory.nbytes


def test_memory_that_is_too_small_says_how_much_is_needed() -> None:
    """For weights, and for the smallest cache; with more than any cache takes the largest is the budget."""
    space, found = stored(tables=False)
    model = model_shape(str(MODEL_DIR), dtype="float32")
    with pytest.raises(OptionValueError, match=r"memory='.*' cannot work: expected at least .* for 2,000 tokens"):
        memory_budget(Memory(model, model.weights.nbytes, 2000), space, found)
    with pytest.raises(
        OptionValueError, match="context=40 cannot work: expected more tokens: of 40 none are quantised"
    ):
        memory_budget(Memory(model, model.weights.nbytes, 40), space, found)
    assert memory_budget(Memory(model, 1 << 40, 2000), space, found).bits == pytest.approx(4.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "budget=None"),
        ({"budget": 2.5, "memory": 1 << 30}, r"budget=2\.5"),
        ({"budget": 2.5, "context": 4096}, "context=4096 cannot work: expected a --memory beside it"),
        ({"budget": 2.5, "windows": 0}, "windows=0"),
        ({"budget": 2.5, "verify": 1}, "verify=1"),
        ({"budget": 2.5, "prefill": 1024}, "prefill=1024"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    """Before a model is loaded."""
    with pytest.raises(OptionValueError, match=message):
        TuneOptions(base={}, **options)


# ------------------------------------------------------------------------------------------------ from end to end


@functools.cache
def tuned(budget: float = 2.5):
    loaded, text = demo()
    options = TuneOptions(
        base=tuning_options(BASE), widths=(1, 2, 4), budget=budget, length=192, prefill=128, windows=1, verify=2
    )
    prepared = tuning.prepare(loaded, text, options)
    fed: list[int] = []
    with Journal(None, tuning.run_settings(loaded, text, options, prepared.space)) as journal:
        return tuning.tune(loaded, prepared, options, journal, fed.append), prepared, sum(fed), len(journal)


def test_a_tuning_beats_the_uniform_cache_on_held_out_text() -> None:
    """At the same bits, by more than the predicted ratio could be luck; the better one is written."""
    report, prepared, fed, _ = tuned()
    best, uniform = report.rows
    assert (uniform.cache, uniform.bits_per_element) == ("uniform 2", 2.5)
    assert best.bits_per_element <= 2.5
    assert best.predicted <= uniform.predicted
    assert best.kl.value < uniform.kl.value
    assert best.ratio is None
    assert uniform.ratio is not None
    assert uniform.ratio.value == pytest.approx(best.kl.value / uniform.kl.value)
    assert report.written == best.cache
    assert verdict(report) == "The tuned cache is better on held-out text."
    assert numbers_line(report).startswith(f"tuned: KL {1000 * best.kl.value:.3g} at 2.5 bits; uniform 2: KL ")
    assert fed <= prepared.work


def test_what_is_written_is_what_was_chosen() -> None:
    """A cache of it stores as many bits as the report says."""
    report, prepared, _, _ = tuned()
    cache = QuantizedCache.from_config(report.config, demo()[0].model.config)
    made = [(layer.settings.key.nbits, layer.settings.value.nbits) for layer in cache.layers]
    said = {(row.layer, row.stream): row.nbits for row in report.streams}
    assert made == [(said[layer, "key"], said[layer, "value"]) for layer in prepared.space.layers]


def test_the_sensitivities_of_a_stream_are_what_they_are_called() -> None:
    """KL divergence with one stream in few bits and all else in the most, less that with the most everywhere."""
    report, prepared, _, done = tuned()
    streams = len(prepared.space.streams)
    assert [len(row.added) for row in report.streams] == [3] * streams
    assert all(row.added[0] > row.added[2] for row in report.streams)  # 1 bit adds more than 4
    assert 0 < report.floor < 1e-4
    assert done == (2 + 3 * streams) + 3 * 2  # each measured once: full and 8 bits, every choice, and three held out


@pytest.mark.parametrize(
    ("kl", "ratio", "written", "message"),
    [
        (0.03, (1.4, 1.6), "uniform 2", "not better on held-out text: uniform 2 has KL 20 at 2.5 bits, and is the one"),
        (0.019, (0.8, 1.1), "tuned to 2.5 bits", "is better on held-out text, but than uniform 2 maybe by chance"),
        (0.010, (0.4, 0.6), "tuned to 2.5 bits", "The tuned cache is better on held-out text."),
    ],
)
def test_a_tuned_cache_that_is_not_better_is_said_not_to_be(
    kl: float, ratio: tuple[float, float], written: str, message: str
) -> None:
    """The sentence says so, and what to take."""
    report = measured.tune()
    tuned_row, uniform = report.rows
    rows = (
        dataclasses.replace(tuned_row, kl=measured.around(kl)),
        dataclasses.replace(uniform, ratio=Estimate(sum(ratio) / 2, *ratio)),
    )
    assert message in verdict(dataclasses.replace(report, rows=rows, written=written))


def test_a_uniform_assignment_may_be_the_best() -> None:
    """With all bits that the budget has, the two are the same cache."""
    report, *_ = tuned(4.5)
    assert [row.nbits for row in report.streams] == [4] * len(report.streams)
    assert "uniform" in verdict(report)
    assert report.rows[0].windows == report.rows[1].windows

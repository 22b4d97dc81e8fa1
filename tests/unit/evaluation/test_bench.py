"""Measuring caches side by side, at sizes where only the structure of the result means something."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from kvquant.errors import ModelLoadError, OptionValueError, UnknownOptionError
from kvquant.evaluation import measure
from kvquant.evaluation import subject as subject_module
from kvquant.evaluation.bench import DEFAULT_CACHES, BenchOptions, bench
from kvquant.evaluation.contenders import Contender, parse_contenders
from kvquant.evaluation.figures import bench as figure
from kvquant.evaluation.figures import check_plot, save
from kvquant.evaluation.in_use import Flush, cache_bytes, next_flush
from kvquant.evaluation.measure import PeakMemory, Spread, held_bytes
from kvquant.evaluation.subject import AttentionSubject, ModelSubject, Subject, SyntheticModel

TINY = SyntheticModel(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16)

# quanto compiles and warns as it likes; its figures are not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:::optimum.*")


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read less than a measurement should."""
    monkeypatch.setattr(measure, "_BANDWIDTH_BYTES", 4 << 20)


def tiny(caches: str, **options: object) -> BenchOptions:
    defaults = {"contexts": (64, 200), "synthetic": TINY, "steps": 2, "rounds": 2, "threads": 1, "memory": False}
    return BenchOptions(contenders=parse_contenders(caches), **{**defaults, **options})


@pytest.fixture(scope="module")
def subject() -> ModelSubject:
    return ModelSubject(TINY, tokens=210, dtype="float32", device="cpu", seed=0)


class TestNames:
    @pytest.mark.parametrize(
        ("text", "label"),
        [
            ("dynamic", "dynamic"),
            ("transformers", "transformers:quanto:4"),
            ("transformers:hqq:1", "transformers:hqq:1"),
            ("transformers:fp8", "transformers:fp8:8"),
            ("static", "static"),
            ("turboquant", "turboquant:4"),
            ("turboquant:3", "turboquant:3"),
            ("kvquant", "kvquant:reference:4"),
            ("kvquant:anything", "kvquant:anything:4"),
            (" kvquant:reference:2 ", "kvquant:reference:2"),
            ("kvquant:reference:2.5", "kvquant:reference:2.5"),
            (
                "kvquant:reference:2:scale=error:smoothing_key=true",
                "kvquant:reference:2:scale=error:smoothing_key=True",
            ),
            ("kvquant:smallest", "kvquant:smallest"),
            ("kvquant:kivi-2:sink_length=4", "kvquant:kivi-2:sink_length=4"),
            ("kvquant:reference:token", "kvquant:reference:4:token"),
            ("kvquant:kvquant:reference:2", "kvquant:kvquant:reference:2"),
            ("transformers:hqq:2:residual_length=64", "transformers:hqq:2:residual_length=64"),
        ],
    )
    def test_a_name_may_leave_out_backend_and_bits(self, text: str, label: str) -> None:
        """What is left out is the kind's usual backend, and 4 bits."""
        assert Contender.parse(text).label == label

    def test_a_label_is_a_name(self) -> None:
        """So what a report says can be asked for again."""
        labels = [contender.label for contender in parse_contenders(DEFAULT_CACHES)]
        assert [contender.label for contender in parse_contenders(",".join(labels))] == labels

    @pytest.mark.parametrize(
        ("text", "error", "says"),
        [
            ("dynamik", UnknownOptionError, "Did you mean 'dynamic'"),
            ("transformers:qanto", UnknownOptionError, "Did you mean 'quanto'"),
            ("dynamic:4", OptionValueError, "it has no backend"),
            ("static:4", OptionValueError, "it has no backend"),
            ("transformers:fp8:4", OptionValueError, "nbits from 8 for fp8"),
            ("turboquant:5", OptionValueError, "nbits from 1, 2, 3, 4 for turboquant"),
            ("turboquant:4:4", OptionValueError, "kind[:backend[:nbits]]"),
            ("transformers:quanto:3", OptionValueError, "nbits from 2, 4 for quanto"),
            ("transformers:quanto:2.5", OptionValueError, "nbits from 2, 4 for quanto"),
            ("kvquant:reference:four", OptionValueError, "kvquant:reference:2"),
            ("kvquant:reference:4:5", OptionValueError, "kind[:backend[:nbits]]"),
            ("kvquant::4", OptionValueError, "kind[:backend[:nbits]]"),
            ("", UnknownOptionError, "dynamic, static, transformers, turboquant, kvquant"),
            ("dynamic,dynamic", OptionValueError, "each cache once"),
            ("kvquant:smallest:4", OptionValueError, "no bits after the preset 'smallest'"),
            ("kvquant:smalest:sink_length=4", UnknownOptionError, "Did you mean 'smallest'"),
            ("kvquant:reference:2:sink_length=-1", OptionValueError, "sink_length=-1 cannot work"),
            ("kvquant:reference:2:nonsense", OptionValueError, "kvquant:smallest"),
        ],
    )
    def test_a_bad_name_is_refused_with_what_would_work(self, text: str, error: type[Exception], says: str) -> None:
        """The message names a way on."""
        with pytest.raises(error) as raised:
            parse_contenders(text)
        assert says in str(raised.value)

    @pytest.mark.parametrize(
        "option",
        [
            {"steps": 0},
            {"batch": 0},
            {"rounds": 0},
            {"contexts": ()},
            {"contexts": (0,)},
            {"dtype": "int8"},
            {"threads": 0},
            {"model": "some", "attention": True},
            {"prefill": True, "attention": True},
            {"against": "static:8"},
        ],
    )
    def test_impossible_options_are_refused(self, option: dict[str, object]) -> None:
        """Before anything is loaded."""
        with pytest.raises(OptionValueError, match=next(iter(option))):
            BenchOptions(**option)


class TestRounds:
    @pytest.mark.parametrize(
        ("name", "period"),
        [
            ("dynamic", None),
            ("static", None),
            ("transformers:hqq:4", 128),
            ("transformers:fp8", None),
            ("kvquant:reference:4", 64),
        ],
    )
    @pytest.mark.parametrize("context", [64, 200])
    def test_tokens_are_really_decoded(
        self, subject: ModelSubject, name: str, period: int | None, context: int
    ) -> None:
        """The cache ends with the history, the steps, and as many more as it took to flush."""
        cache = Contender.parse(name).make(subject.config, 300)
        lengths = []
        hook = subject.model.register_forward_hook(lambda *_: lengths.append(int(cache.get_seq_length())))
        try:
            made = subject.run(cache, subject.history(context), steps=3)
        finally:
            hook.remove()
        assert lengths[:4] == [context + 1, context + 2, context + 3, context + 4]
        assert made.flush_period == period
        assert made.tokens == lengths[-1] == cache.get_seq_length()
        assert len(lengths) == (4 if period is None else 5)
        assert all(layer.get_seq_length() == made.tokens for layer in cache.layers)

    @pytest.mark.parametrize("context", [64, 200, 256])
    def test_the_last_step_is_the_one_that_flushes(self, subject: ModelSubject, context: int) -> None:
        """One step before, the tokens were still in the window; after it, they are quantised."""
        cache = Contender.parse("kvquant:reference:4").make(subject.config, 300)
        quantised = []
        hook = subject.model.register_forward_hook(lambda *_: quantised.append(len(cache.layers[0].stores[0].body)))
        try:
            subject.run(cache, subject.history(context), steps=2)
        finally:
            hook.remove()
        assert quantised[-1] == quantised[-2] + 64
        assert next_flush(cache) == Flush(64, 64)

    def test_every_cache_gets_the_same_history(self, subject: ModelSubject) -> None:
        """Also from another model made with the same seed, as in the processes that measure memory."""
        again = ModelSubject(TINY, tokens=210, dtype="float32", device="cpu", seed=0)
        for mine, other in zip(subject.history(64), again.history(64), strict=True):
            assert torch.equal(mine[0], other[0])
            assert torch.equal(mine[1], other[1])

    def test_bytes_of_any_cache_are_those_of_its_tensors(self, subject: ModelSubject) -> None:
        """4 bits take less than a quarter of float32 for transformers' cache too, whose tensors are subclasses."""
        sizes = {}
        for name in ("dynamic", "transformers:hqq:4", "kvquant:reference:4"):
            cache = Contender.parse(name).make(subject.config, 300)
            for layer, (keys, values) in enumerate(subject.history(1024)):
                cache.update(keys, values, layer)
            sizes[name] = cache_bytes(cache)
        full = 2 * 2 * 2 * 1024 * 16 * 4
        assert sizes["dynamic"] == full
        assert full / 8 < sizes["transformers:hqq:4"] < full / 4
        assert full / 8 < sizes["kvquant:reference:4"] < full / 2

    def test_a_model_without_room_for_the_context_is_refused(self, tmp_path: object) -> None:
        """The message says how much room there is."""
        TINY.make(1000).save_pretrained(tmp_path)
        assert ModelSubject(str(tmp_path), 400, "bfloat16", "cpu", 0).describe()["dtype"] == "bfloat16"
        with pytest.raises(OptionValueError, match="at most 488 tokens"):
            ModelSubject(str(tmp_path), 500, "float32", "cpu", 0)

    def test_a_model_that_is_not_there(self, tmp_path: object) -> None:
        """It is named."""
        with pytest.raises(ModelLoadError, match="nothing-here"):
            ModelSubject(f"{tmp_path}/nothing-here", 100, "float32", "cpu", 0)


class TestReport:
    def test_a_report_has_every_cache_at_every_context(self) -> None:
        """In the order asked for, with figures from every round."""
        done: list[float] = []
        options = tiny("dynamic,transformers:hqq:4,kvquant:reference:2")
        report = bench(options, done.append)
        labels = [contender.label for contender in options.contenders]
        assert [(made.cache, made.context) for made in report.results] == [(c, n) for n in (64, 200) for c in labels]
        assert sum(done) == options.work
        for made in report.results:
            assert made.problem == ""
            assert made.tokens > made.context + options.steps
            assert made.step.count == options.rounds * options.steps
            assert made.fill.count == made.amortised.count == made.speedup.count == options.rounds
            assert made.step.low <= made.step.median <= made.step.high
            assert 0 < made.read_bytes <= made.cache_bytes
            assert (made.kernel != "") == made.cache.startswith("kvquant") if made.context == 200 else True
            assert made.attention is made.over_limit is made.prefill is None
            assert made.speedup_quantised.count == options.rounds
            assert made.peak_bytes is None
            assert (made.flush is None) == (made.cache == "dynamic")
        assert report.bandwidth > 1e8
        assert report.floor.count == options.rounds * options.steps
        assert {made.speedup for made in report.results if made.cache == "dynamic"} == {Spread(1.0, 1.0, 1.0, 2)}

    def test_a_report_is_json(self) -> None:
        """With the machine, the model and the options in it."""
        report = bench(tiny("dynamic", contexts=(64,), rounds=1))
        read = json.loads(json.dumps(report.to_dict()))
        assert read["model"]["layers"] == 2
        assert read["options"]["synthetic"]["head_dim"] == 16
        assert {"cpu", "threads", "torch", "transformers", "kvquant"} <= set(read["machine"])
        assert read["results"][0]["step"]["count"] == 2

    def test_the_number_of_threads_is_the_caller_s_again(self) -> None:
        """It belongs to the process."""
        before = torch.get_num_threads()
        report = bench(tiny("dynamic", contexts=(64,), threads=before + 1))
        assert report.machine["threads"] == before + 1
        assert torch.get_num_threads() == before
        assert gc.isenabled()

    def test_without_dynamic_there_are_no_ratios(self) -> None:
        """There is nothing to compare with."""
        report = bench(tiny("kvquant:reference:4", contexts=(64,)))
        assert report.results[0].speedup is None
        assert report.results[0].step is not None

    def test_speed_can_be_compared_with_any_of_them(self) -> None:
        """What a part costs: the same cache with and without it, round by round."""
        plain, parts = "kvquant:reference:2:smoothing_key=False:scale=range", "kvquant:reference:2:smoothing_key=True"
        report = bench(tiny(f"dynamic,{plain},{parts}", contexts=(200,), rounds=3, attention=True, against=plain))
        full, base, other = report.results
        assert base.speedup == Spread(1.0, 1.0, 1.0, 3)
        assert other.speedup.count == full.speedup.count == 3
        assert other.speedup.low <= base.amortised.high / other.amortised.low
        assert other.speedup.high >= base.amortised.low / other.amortised.high

    def test_a_cache_with_options_is_what_it_says(self, subject: ModelSubject) -> None:
        """Also from a report that was read back."""
        for name in ("kvquant:smallest:group_size=16", "kvquant:reference:2:sink_length=4:skip_layers=[0,1]"):
            contender = Contender.parse(name)
            cache = contender.make(subject.config, 1)
            assert cache.config.sink_length == 4
            assert Contender.parse(contender.label).options == contender.options
        made = Contender.parse("transformers:hqq:2:residual_length=64").make(subject.config, 1)
        assert made.layers[0].residual_length == 64

    def test_a_cache_whose_library_is_missing_does_not_stop_the_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is reported with the reason."""
        monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)
        report = bench(tiny("dynamic,transformers:quanto:4", contexts=(64,)))
        dynamic, quanto = report.results
        assert dynamic.step is not None
        assert quanto.step is None
        assert "pip install optimum-quanto" in quanto.problem

    def test_a_cache_that_fails_does_not_stop_the_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What it raised is reported, and what it did at shorter contexts stays."""
        run = Subject.run

        def fail_when_long(self: Subject, cache: object, history: list, steps: int) -> object:
            if history[0][0].shape[2] > 100 and type(cache).__module__.startswith("kvquant"):
                raise RuntimeError("no more room")
            return run(self, cache, history, steps)

        monkeypatch.setattr(Subject, "run", fail_when_long)
        report = bench(tiny("dynamic,kvquant:reference:4"))
        short, long = (made for made in report.results if made.cache == "kvquant:reference:4")
        assert short.problem == ""
        assert short.step is not None
        assert long.problem == "failed at 200 tokens: no more room"
        assert long.step is None
        assert all(made.step is not None for made in report.results if made.cache == "dynamic")

    def test_peak_memory_is_measured_in_a_process_of_its_own(self) -> None:
        """The peak holds the cache at least, of which a long history makes the most."""
        report = bench(tiny("dynamic", contexts=(16384,), rounds=1))
        measured = bench(dataclasses.replace(report.options, memory=True)).results[0]
        assert measured.problem == ""
        assert measured.peak_method
        assert measured.peak_bytes >= 0.9 * measured.cache_bytes
        # DynamicCache writes each layer's history again at every step.
        assert measured.cache_bytes / 3 < measured.step_bytes <= measured.peak_bytes

    def test_attention_alone(self) -> None:
        """Its part of a step is known, and how far that is from reading what the cache holds."""
        report = bench(tiny("dynamic,kvquant:reference:4", contexts=(200,), attention=True, memory=True))
        assert report.model["architecture"] is None
        assert report.floor is None
        for made in report.results:
            assert made.problem == ""
            assert made.attention.count == made.step.count
            assert made.attention.median < made.step.median
            assert made.over_limit == pytest.approx(made.attention.median * report.bandwidth / made.read_bytes)
            assert made.step_bytes <= made.peak_bytes

    def test_attention_alone_attends_over_all_that_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also in a cache of fixed size, whose end is empty."""
        subject = AttentionSubject(TINY, 100, "float32", "cpu", 0)
        attend, outputs = subject_module.sdpa_attention_forward, []
        monkeypatch.setattr(subject_module, "sdpa_attention_forward", lambda *given: outputs.append(attend(*given)[0]))
        for name in ("dynamic", "static"):
            cache = Contender.parse(name).make(subject.config, 300)
            subject.fill(cache, subject.history(70))
            subject.decode(cache)
        assert len(outputs) == 2 * TINY.layers
        torch.testing.assert_close(outputs[0], outputs[2])

    @pytest.mark.parametrize("attention", [True, False])
    def test_several_sequences_at_once(self, attention: bool) -> None:
        """Each takes its own bytes."""
        sizes = [
            bench(tiny("dynamic,kvquant:reference:4", contexts=(64,), batch=batch, attention=attention)).results
            for batch in (1, 3)
        ]
        assert 3 * sizes[0][0].cache_bytes == sizes[1][0].cache_bytes
        assert all(made.step is not None for made in sizes[1])

    def test_a_real_prefill(self) -> None:
        """What the cache adds is its own time beyond dynamic's, over the model's."""
        report = bench(tiny("dynamic,kvquant:reference:4", prefill=True))
        for made in report.results:
            assert made.prefill.count == made.prefill_added.count == 2
            assert made.prefill.median > made.fill.low / 2
            assert made.cache != "dynamic" or made.prefill_added.median == 0

    def test_the_package_turboquant(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where it is not installed, and where it fails, the reason stands in the report."""
        missing = bench(tiny("turboquant", contexts=(64,))).results[0]
        assert missing.problem == "No module named 'turboquant' (pip install turboquant)"
        (tmp_path / "turboquant.py").write_text(
            "from transformers import DynamicCache\n"
            "class TurboQuantCache(DynamicCache):\n"
            "    def __init__(self, bits):\n        super().__init__()\n"
            "    def update(self, *args):\n        raise AttributeError(\"numpy has no 'trapz'\")\n"
        )
        (tmp_path / "turboquant-0.2.0.dist-info").mkdir()
        (tmp_path / "turboquant-0.2.0.dist-info" / "METADATA").write_text("Name: turboquant\nVersion: 0.2.0\n")
        monkeypatch.syspath_prepend(tmp_path)
        failing = bench(tiny("turboquant", contexts=(64,))).results[0]
        assert failing.problem.startswith("failed at 64 tokens (turboquant 0.2.0, numpy 2.")
        assert failing.problem.endswith("): numpy has no 'trapz'")


class TestPlot:
    def test_a_plot_is_a_picture(self, tmp_path: Path) -> None:
        """With and without peak memory."""
        report = bench(tiny("dynamic,kvquant:reference:4"))
        save(figure.draw(report), tmp_path / "bench.png")
        with Image.open(tmp_path / "bench.png") as picture:
            assert picture.size == (1800, 750)
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20

    @pytest.mark.parametrize(("name", "says"), [("plot.svg", "ends in .png"), ("nowhere/plot.png", "a folder that")])
    def test_what_cannot_be_written_is_refused_first(self, tmp_path: Path, name: str, says: str) -> None:
        """The message names a way on."""
        with pytest.raises(OptionValueError, match=says):
            check_plot(tmp_path / name)

    def test_without_matplotlib(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error says what to install."""
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"pip install 'kvquant\[eval\]'"):
            check_plot(tmp_path / "plot.png")


class TestMeasuring:
    def test_the_spread_of_some_figures(self) -> None:
        """The median of an even number lies between the middle two."""
        assert Spread.of([4.0, 1.0, 2.0, 3.0]) == Spread(2.5, 1.0, 4.0, 4)

    @pytest.mark.parametrize("by_kernel", [True, False])
    def test_peak_memory_sees_what_was_freed_before_the_end(
        self, monkeypatch: pytest.MonkeyPatch, *, by_kernel: bool
    ) -> None:
        """64 MiB that live for a moment count."""
        if not by_kernel:
            monkeypatch.setattr(measure, "_reset_kernel_peak", lambda: False)
        with PeakMemory(torch.device("cpu")) as memory:
            states = torch.ones(16 << 20)
            states.add_(1)
            del states
        assert memory.rise > 60 << 20
        assert memory.method

    def test_without_proc_and_psutil_memory_cannot_be_measured(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: object
    ) -> None:
        """The error says what to install."""
        monkeypatch.setattr(measure, "_STATUS", tmp_path / "none")
        monkeypatch.setitem(__import__("sys").modules, "psutil", None)
        with pytest.raises(ImportError, match=r"pip install 'kvquant\[eval\]'"):
            measure.resident_bytes()

    def test_psutil_measures_where_there_is_no_proc(self, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
        """As on macOS."""
        monkeypatch.setattr(measure, "_STATUS", tmp_path / "none")
        assert measure.resident_bytes() > 1 << 20

    def test_tensors_held_twice_count_once(self) -> None:
        """Views share their storage, and holders may hold each other."""

        class Holder:
            pass

        one, other = Holder(), Holder()
        one.states = torch.zeros(100)
        one.partner, other.partner = other, one
        other.parts = {"view": one.states[:10], "more": [torch.zeros(5), (torch.zeros(1, dtype=torch.uint8),)]}
        assert held_bytes(one, other) == 400 + 20 + 1

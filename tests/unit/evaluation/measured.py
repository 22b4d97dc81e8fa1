"""Small reports of every kind, as files that commands print: the numbers mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvquant._version import __version__
from kvquant.engine.config import CacheConfig
from kvquant.evaluation.attention import AttentionReport, AttentionRow, LayerErrors
from kvquant.evaluation.bench import BenchOptions, BenchReport, CacheResult
from kvquant.evaluation.contenders import parse_contenders
from kvquant.evaluation.intervals import Estimate
from kvquant.evaluation.longbench.published import PublishedScore
from kvquant.evaluation.longbench.report import Bucket, LongBenchReport, LongBenchRow
from kvquant.evaluation.longbench.tasks import OVERALL
from kvquant.evaluation.measure import Spread
from kvquant.evaluation.needle import NeedleCell, NeedleReport, NeedleRow
from kvquant.evaluation.perplexity import PerplexityReport, PerplexityRow
from kvquant.evaluation.plan import PlanReport, PlanRow
from kvquant.evaluation.rate_distortion import RateDistortionReport, RateDistortionRow
from kvquant.evaluation.tuning.report import CurvePoint, StreamRow, TuneReport, TuneRow, UniformPoint

MODEL = "the shipped model"
MACHINE = {
    "system": "Linux x86_64",
    "cpu": "A processor",
    "cores": 2,
    "threads": 1,
    "load": 0.5,
    "device": "cpu",
    "python": "3.11.7",
    "kvquant": __version__,
    "torch": "2.13.0",
    "transformers": "5.23.0",
}
BITS = {8: 8.5, 4: 4.5, 2: 2.5}


def around(value: float) -> Estimate:
    return Estimate(value, 0.9 * value, 1.1 * value)


def cache(width: int, **options: Any) -> dict[str, Any]:
    """Return what evaluations say of a cache in their settings."""
    return {"kind": "kvquant", **CacheConfig(nbits=width).to_dict(), **options}


def caches(widths: tuple[int, ...], **options: Any) -> dict[str, Any]:
    return {"full": {"kind": "full"}, **{f"reference:{width}": cache(width, **options) for width in widths}}


def settings(widths: tuple[int, ...], **others: Any) -> dict[str, Any]:
    model = {"outliers": None, "dtype": "float32", "device": "cpu", "threads": 1}
    return {"seed": 0, "contexts": [256, 1024], "caches": caches(widths), "model": model, **others}


def perplexity(widths: tuple[int, ...] = (4, 2), kl: dict[int, float] | None = None, **others: Any) -> PerplexityReport:
    """Return a report whose KL divergences are 1/100 of the scale's step, or those given."""
    kl = kl or {width: 0.01 / 2**width for width in widths}
    rows = [
        PerplexityRow(
            cache="full" if width is None else f"reference:{width}",
            context=context,
            prefill=context // 2,
            tokens=context,
            perplexity=around(20.0),
            difference=around(0.5),
            change=Estimate(0.025, -0.001, 0.03),
            kl=around(0.0 if width is None else kl[width]),
            agreement=around(0.9),
            kl_ratio=None,
            bits_per_element=32.0 if width is None else BITS[width],
            cache_bits_per_element=12.0,
            one_pass=None,
            windows=[{"nll": 3.0, "kl": 0.1, "agreement": 0.9}] * 3,
        )
        for context in (256, 1024)
        for width in (None, *widths)
    ]
    return PerplexityReport(settings(widths, **others), tuple(rows))


def needle(widths: tuple[int, ...] = (4, 2)) -> NeedleReport:
    rows = [
        NeedleRow(
            cache=label,
            context=context,
            questions=4,
            retrieved=around(0.75),
            digits=around(0.9),
            nll=around(0.2),
            kl=around(0.01),
            agreement=around(0.9),
            bits_per_element=3.0,
            cache_bits_per_element=8.0,
            depths=[NeedleCell(depth, around(0.75), 0.9, 0.2, 0.01, 0.9) for depth in (0, 100)],
            trials=[],
        )
        for context in (256, 1024)
        for label in caches(widths)
    ]
    return NeedleReport(settings(widths, depths=[0, 100], trials=2), tuple(rows))


def longbench(widths: tuple[int, ...] = (4, 2)) -> LongBenchReport:
    rows = [
        LongBenchRow(
            cache=label,
            task=task,
            metric="" if task == OVERALL else "qa_f1",
            questions=12 if task == OVERALL else 6,
            score=around(61.5),
            difference=around(-1.0),
            kl=around(0.01),
            agreement=None,
            bits_per_element=3.0,
            cache_bits_per_element=8.0,
            truncated=1,
            buckets=[Bucket("0-4k", 6, 61.5)] if task == "hotpotqa_e" else [],
            published=[PublishedScore("KIVI-2", 60.0, "a paper")] if task == "qasper" and label == "full" else [],
            answers=[],
        )
        for task in ("qasper", "hotpotqa_e", OVERALL)
        for label in caches(widths)
    ]
    tasks = {task: {"questions": 6} for task in ("qasper", "hotpotqa_e")}
    chosen = settings(widths, tasks=tasks, chat=False, max_length=None)
    del chosen["contexts"]
    return LongBenchReport(chosen, tuple(rows))


def bench(names: str = "dynamic,transformers:fp8,kvquant:reference:4,kvquant:reference:2") -> BenchReport:
    """Return a report in which each cache is half as large and twice as fast as the one before it."""
    contenders = parse_contenders(names)
    results = [
        CacheResult(
            cache=contender.label,
            context=context,
            tokens=context + 9,
            step=Spread(0.1 / 2**index, 0.09 / 2**index, 0.11 / 2**index, 3),
            amortised=Spread(0.1 / 2**index, 0.09 / 2**index, 0.11 / 2**index, 3),
            speedup=Spread(2.0**index, 2.0**index, 2.0**index, 3),
            cache_bytes=(64 << 20) >> index,
        )
        for context in (1024, 4096)
        for index, contender in enumerate(contenders)
    ]
    model = {
        "name": "random weights",
        "architecture": "LlamaForCausalLM",
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "dtype": "float32",
    }
    options = BenchOptions(contenders=contenders, contexts=(1024, 4096), memory=False)
    return BenchReport(MACHINE, model, 1e10, None, options, tuple(results))


def plan(widths: tuple[int, ...] = (4, 2)) -> PlanReport:
    rows = [
        PlanRow(
            cache=label,
            nbytes=1 << 20,
            parts={"codes": 1 << 20, "spare": 0},
            smaller=3.0,
            bits_per_element=3.0,
            most_nbytes=1 << 20,
            total=2 << 20,
            left=1 << 20,
            longest=5000,
            layers=[],
            curve=[(256, 1 << 18), (1024, 1 << 20)],
        )
        for label in caches(widths)
    ]
    chosen = {
        "model": {"name": "a-model", "architecture": "LlamaForCausalLM", "dtype": "bfloat16", "positions": 2048},
        "weights": {"nbytes": 1 << 20, "parameters": 1 << 19, "how": "counted, in bfloat16"},
        "context": 1024,
        "decode": 256,
        "batch": 1,
        "memory": 3 << 20,
        "overhead": 0,
        "caches": caches(widths),
    }
    return PlanReport(chosen, tuple(rows))


def tune() -> TuneReport:
    """Return a report of two layers, whose tuned cache is better than the uniform one."""
    tuned = cache(1, nbits_key=1, nbits_value=1, layers={"1": {"nbits_key": 3, "nbits_value": 3}})
    chosen = settings(())
    del chosen["contexts"]
    chosen |= {"base": {"backend": "reference", "options": {"scale": "error"}}, "widths": [1.0, 2.0, 3.0]}
    chosen |= {"widest": 8.0, "length": 256, "prefill": 128, "windows": 3, "verify": 10}
    chosen |= {"budget": {"bits": 2.5, "memory": None}, "caches": {"tuned to 2.5 bits": tuned, "uniform 2": cache(2)}}
    rows = [
        TuneRow(
            cache=name,
            bits_per_element=2.5,
            predicted=kl,
            kl=around(kl),
            ratio=None if name != "uniform 2" else around(0.5),
            agreement=around(0.9),
            windows=[kl] * 10,
        )
        for name, kl in (("tuned to 2.5 bits", 0.01), ("uniform 2", 0.02))
    ]
    return TuneReport(
        settings=chosen,
        floor=1e-6,
        streams=[
            StreamRow(layer, stream, 1.0 + 2 * layer, 0.25, [1.5, 2.5, 3.5], [0.1 * layer, 0.01 * layer, 0.0])
            for layer in (0, 1)
            for stream in ("key", "value")
        ],
        curve=[CurvePoint(1.5, 0.2), CurvePoint(2.5, 0.01), CurvePoint(3.5, 1e-6)],
        uniform=[UniformPoint(1.0, 1.5, 0.2), UniformPoint(2.0, 2.5, 0.02), UniformPoint(3.0, 3.5, 1e-6)],
        written="tuned to 2.5 bits",
        config={name: value for name, value in tuned.items() if name != "kind"},
        rows=tuple(rows),
    )


def attention(widths: tuple[int, ...] = (4, 2)) -> AttentionReport:
    rows = [
        AttentionRow(
            cache=f"reference:{width}",
            context=context,
            bits_per_element=BITS[width],
            key=0.2 / width,
            value=0.3 / width,
            output=around(0.1 / width),
            layers=[LayerErrors(layer, None if layer else 0.2 / width, 0.3 / width, 0.1 / width) for layer in (0, 1)],
            windows=[0.1 / width] * 3,
        )
        for context in (256, 1024)
        for width in widths
    ]
    chosen = settings(widths, queries=32, windows=4)
    del chosen["caches"]["full"]
    return AttentionReport(chosen, tuple(rows))


def rate_distortion(widths: tuple[int, ...] = (4, 2), **left_out: str) -> RateDistortionReport:
    rows = [
        RateDistortionRow(
            cache=f"reference:{width}",
            states=states,
            stream=stream,
            axis="channel",
            bits_per_element=BITS[width] + (stream == "key") / 8,
            distortion=0.25**width,
            snr=6.02 * width,
            bound=float(width),
            gap=BITS[width] - width,
        )
        for states in ("gaussian", "outliers")
        for width in widths
        for stream in ("key", "value")
    ]
    chosen = {"states": ["gaussian", "outliers"], "streams": ["key", "value"], "tokens": 4096, "heads": 4}
    chosen |= {"head_dim": 64, "device": "cpu", "seed": 0, "caches": caches(widths), "versions": {}}
    del chosen["caches"]["full"]
    bound = [(0.0, 1.0), (2.0, 0.0625), (9.0, 4e-6)]
    return RateDistortionReport(chosen, tuple(rows), {"gaussian": bound, "outliers": bound}, left_out)


#: A report of each kind.
ALL = {
    "perplexity": perplexity,
    "needle": needle,
    "longbench": longbench,
    "attention": attention,
    "rate_distortion": rate_distortion,
    "bench": bench,
    "plan": plan,
    "tune": tune,
}


def printed(report: Any, *, model: str = MODEL, **machine: Any) -> dict[str, Any]:
    """Return what a command would print of a report."""
    said = report.to_dict() if isinstance(report, BenchReport) else {"model": model, **report.to_dict()}
    content: dict[str, Any] = json.loads(json.dumps({**said, "machine": {**MACHINE, **machine}}))
    return content


def saved(folder: Path, name: str, content: Any) -> Path:
    """Write what a command would print, and return the file."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path

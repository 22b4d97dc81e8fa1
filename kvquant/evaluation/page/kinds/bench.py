"""What a page shows of `kvquant bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from kvquant.evaluation.bench import BenchOptions, BenchReport, CacheResult
from kvquant.evaluation.candidates import FULL
from kvquant.evaluation.page.parts import (
    Cell,
    Column,
    Group,
    Table,
    listing,
    number,
    plural,
    shortened,
    spread,
    tokens,
)
from kvquant.evaluation.reports import ReportFile

TITLE = "Memory and latency"

_MIB = 1 << 20
_COLUMNS = (
    "Medians; smaller figures are the lowest and the highest of the rounds. A step has its share of a flush in it, "
    "which is a step in which tokens leave the window and are quantised. Times faster are of the same round, and below "
    "1 where a cache is slower; 'best "
    "other' is the fastest quantised cache that is not kvquant's. Cache: held with the context in it."
)


def lead(report: BenchReport) -> tuple[str, ...]:
    """Return what was measured."""
    options, model = report.options, report.model
    what = "cache and attention alone" if options.attention else "a whole model"
    heads = f"{model['heads']} query and {model['kv_heads']} key/value heads of {model['head_dim']}"
    measured = (
        "Each cache is filled with random states, as a prefill would do it, and then decodes real tokens through "
        f"{what}: {model['layers']} layers, {heads}, {model['dtype']}, {plural(options.batch, 'sequence')}. Every "
        f"cache has its turn in {plural(options.rounds, 'round')} of {plural(options.steps, 'step')}."
    )
    said = [measured, f"Memory is read at {report.bandwidth / 1e9:.1f} GB/s."]
    if report.floor is not None:
        said.append(f"The model alone, over a cache of one token, takes {1000 * report.floor.median:.1f} ms a step.")
    return tuple(said)


def tables(report: BenchReport) -> tuple[Table, ...]:
    """Return a table for each context."""
    contexts = dict.fromkeys(result.context for result in report.results)
    made = {context: [one for one in _made(report) if one.context == context] for context in contexts}
    return tuple(_table(context, results, _faster(report)) for context, results in made.items() if results)


def seen(report: BenchReport) -> str:
    """Return what the picture shows."""
    made = _made(report)
    if not made:
        return ""
    longest = max(result.context for result in made)
    each = "; ".join(
        f"{result.cache} {_mib(result.cache_bytes).text} MiB and {1000 * result.amortised.median:.3g} ms"
        for result in made
        if result.context == longest and result.amortised is not None
    )
    contexts = listing([tokens(context) for context in dict.fromkeys(result.context for result in made)])
    return shortened(
        f"Memory of each cache, and time of a decode step, against contexts of {contexts} tokens, both on logarithmic "
        f"axes. At {tokens(longest)}: {each}.",
        900,
    )


def notes(report: BenchReport) -> tuple[str, ...]:
    """Return what the columns mean, and what could not be measured."""
    said = [_COLUMNS]
    if any(result.peak_bytes is not None for result in report.results):
        said.append(
            "Peak: how far memory in use rises while filling, decoding and flushing; temporary: while decoding and "
            "flushing alone. Both in a fresh process."
        )
    problems = dict.fromkeys((result.cache, result.problem) for result in report.results if result.problem)
    said += [f"{cache} could not be measured: {problem}" for cache, problem in problems]
    kernels = dict.fromkeys(result.kernel for result in report.results if result.kernel)
    said += [f"Attention over quantised tokens: {kernel}." for kernel in kernels]
    return tuple(said)


def summary(report: BenchReport) -> Group:
    """Return what the longest context says."""
    made = _made(report)
    longest = max((result.context for result in made), default=0)
    results = [result for result in made if result.context == longest]
    held = {result.cache: result.cache_bytes for result in results}
    return Group(
        f"Bench, {tokens(longest)} tokens, on {report.machine['device']}",
        (
            Column("times smaller", _smaller(held)),
            Column("ms a step", {result.cache: spread(result.amortised, "{:.1f}", 1000) for result in results}),
            Column(_faster(report), {result.cache: spread(result.speedup, "{:.2f}") for result in results}),
        ),
    )


def options(file: ReportFile) -> dict[str, Any]:
    """Return the options of the command."""
    chosen: BenchOptions = file.report.options  # type: ignore[union-attr]
    said: dict[str, Any] = {
        "model": chosen.model,
        "contexts": chosen.contexts,
        "caches": [contender.label for contender in chosen.contenders],
        "against": chosen.against,
        **{name: getattr(chosen, name) for name in ("attention", "batch", "steps", "rounds", "dtype", "device")},
        "threads": chosen.threads,
        "seed": chosen.seed,
        "no-memory": not chosen.memory,
        "prefill": chosen.prefill,
    }
    if chosen.model is None:
        shape = chosen.synthetic
        said |= {one.name.replace("_", "-"): getattr(shape, one.name) for one in fields(shape)}
    return said


def _made(report: BenchReport) -> list[CacheResult]:
    return [result for result in report.results if result.amortised is not None]


def _mib(count: int | None) -> Cell:
    return number(count, "{:.1f}", 1 / _MIB)


def _flush(result: CacheResult) -> Cell:
    return number(None if result.flush is None else result.flush.median, "{:.0f}", 1000)


def _smaller(held: Mapping[str, int | None]) -> dict[str, Cell]:
    """Return how many times smaller caches are than that in full precision, where it was measured."""
    full = held.get(FULL)
    if full is None:
        return {}
    return {cache: number(full / count, "{:.2f}") for cache, count in held.items() if count}


def _faster(report: BenchReport) -> str:
    against = report.options.against
    full = against in (None, "dynamic")  # whose row is called so on the page
    return f"times faster than {FULL if full else str(against).removeprefix('kvquant:')}"


def _table(context: int, results: Sequence[CacheResult], faster: str) -> Table:
    def column(heading: str, *, of: str, form: str = "{:.2f}", factor: float = 1) -> Column:
        return Column(heading, {result.cache: spread(getattr(result, of), form, factor) for result in results})

    return Table.of(
        f"{tokens(context)} tokens",
        column("ms a step", of="amortised", form="{:.1f}", factor=1000),
        Column("ms a flush", {one.cache: _flush(one) for one in results}),
        Column("tokens between flushes", {one.cache: number(one.flush_period, "{:,}") for one in results}),
        column(faster, of="speedup"),
        column("than best other", of="speedup_quantised"),
        column("attention, ms", of="attention", factor=1000),
        Column("times its limit", {one.cache: number(one.over_limit, "{:.1f}") for one in results}),
        Column("cache, MiB", {one.cache: _mib(one.cache_bytes) for one in results}),
        Column("times smaller", _smaller({one.cache: one.cache_bytes for one in results})),
        Column("peak, MiB", {one.cache: _mib(one.peak_bytes) for one in results}),
        Column("temporary, MiB", {one.cache: _mib(one.step_bytes) for one in results}),
        column("fill, s", of="fill"),
        column("prefill, s", of="prefill", form="{:.1f}"),
        column("added to the prefill, %", of="prefill_added", factor=100),
    )

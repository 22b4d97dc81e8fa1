"""The picture of `kvquant bench`: memory and latency against context length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvquant.evaluation.figures import MARKERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvquant.evaluation.bench import BenchReport, CacheResult

_MIB = 1 << 20


def draw(report: BenchReport) -> Figure:
    """Draw memory and latency against context length, one line for each cache.

    Memory is the peak where it was measured, and the cache's own bytes beside it; latency is a decode step with its
    share of a flush, with the range of the rounds.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    memory, latency = figure.subplots(1, 2)
    caches = dict.fromkeys(result.cache for result in report.results)
    for number, cache in enumerate(caches):
        made = [result for result in report.results if result.cache == cache and result.amortised is not None]
        if made:
            look = {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "label": cache}
            _memory_line(memory, made, look)
            _latency_line(latency, made, look)
    peak = any(result.peak_bytes is not None for result in report.results)
    memory.set(title="Memory", ylabel="MiB: highest rise (lines), held (dotted)" if peak else "MiB held by the cache")
    latency.set(title="Latency", ylabel="ms a decode step")
    for axes in (memory, latency):
        _context_axis(axes, report.options.contexts)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(visible=True, which="both", alpha=0.25)
    handles, labels = memory.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize="small", frameon=False)
    model, machine = report.model, report.machine
    figure.suptitle(
        f"{model['architecture'] or model['name']}, {model['layers']} layers, {model['heads']} query and "
        f"{model['kv_heads']} key/value heads of {model['head_dim']}, {model['dtype']}; {machine['cpu']}, "
        f"{machine['threads']} {'thread' if machine['threads'] == 1 else 'threads'}, on {machine['device']}",
        fontsize="small",
    )
    return figure


def _memory_line(axes: Any, made: Sequence[CacheResult], look: dict[str, Any]) -> None:
    contexts = [result.context for result in made]
    held = [(result.cache_bytes or 0) / _MIB for result in made]
    if all(result.peak_bytes is not None for result in made):
        axes.plot(contexts, [(result.peak_bytes or 0) / _MIB for result in made], **look)
        axes.plot(contexts, held, color=look["color"], linestyle=":", linewidth=1)
    else:
        axes.plot(contexts, held, **look)


def _latency_line(axes: Any, made: Sequence[CacheResult], look: dict[str, Any]) -> None:
    contexts = [result.context for result in made]
    steps = [result.amortised for result in made if result.amortised is not None]
    axes.plot(contexts, [1000 * step.median for step in steps], **look)
    low, high = ([1000 * getattr(step, end) for step in steps] for end in ("low", "high"))
    axes.fill_between(contexts, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _context_axis(axes: Any, contexts: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(contexts), [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in sorted(contexts)])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tokens in the cache")

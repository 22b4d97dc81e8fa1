"""Pictures of what was measured, as PNG files."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvquant.errors import MissingExtraError, OptionValueError

if TYPE_CHECKING:
    from kvquant.evaluation.bench import BenchReport, CacheResult

_MIB = 1 << 20
_DPI = 150


def check_plot(path: Path | None) -> None:
    """Refuse a plot that could not be written when all is measured.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionValueError: it is no PNG file, or its folder does not exist.
    """
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise OptionValueError("plot", str(path), "a file name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise OptionValueError("plot", str(path), "a file in a folder that exists")
    try:
        importlib.import_module("matplotlib")
    except ImportError as cause:
        raise MissingExtraError("matplotlib", "pip install 'kvquant[eval]'") from cause


def plot_bench(report: BenchReport, path: Path) -> None:
    """Draw memory and latency against context length, one line for each cache.

    Memory is the peak where it was measured, and the cache's own bytes beside it; latency is a decode step with its
    share of a flush, with the range of the rounds.
    """
    figure, (memory, latency) = _figure(1, 2, (12, 5))
    caches = dict.fromkeys(result.cache for result in report.results)
    for number, cache in enumerate(caches):
        made = [result for result in report.results if result.cache == cache and result.amortised is not None]
        if made:
            look = {"color": f"C{number}", "marker": "os^Dv*Ph"[number % 8], "label": cache}
            _memory_line(memory, made, look)
            _latency_line(latency, made, look)
    peak = any(result.peak_bytes is not None for result in report.results)
    memory.set(title="Memory", ylabel="MiB: highest rise (lines), held (dotted)" if peak else "MiB held by the cache")
    latency.set(title="Latency", ylabel="ms a decode step")
    for axes in (memory, latency):
        _context_axis(axes, report.options.contexts)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(visible=True, which="both", alpha=0.25)
    memory.legend(fontsize="small")
    model, machine = report.model, report.machine
    figure.suptitle(
        f"{model['architecture'] or model['name']}, {model['layers']} layers, {model['heads']} query and "
        f"{model['kv_heads']} key/value heads of {model['head_dim']}, {model['dtype']}; {machine['cpu']}, "
        f"{machine['threads']} threads, on {machine['device']}",
        fontsize="small",
    )
    figure.savefig(path, dpi=_DPI)


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


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure that needs no screen, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)

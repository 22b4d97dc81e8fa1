"""The picture of `kvquant plan`: memory against context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvquant.evaluation.figures import MARKERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvquant.evaluation.plan import PlanReport

_GIB = 1 << 30


def draw(report: PlanReport) -> Figure:
    """Draw weights and cache together against the tokens in the cache, one line for each cache.

    Dashed lines are the memory that there is, the weights alone, and the model's positions.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    settings = report.settings
    fixed, positions = settings["weights"]["nbytes"] + settings["overhead"], settings["model"]["positions"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(report.rows):
        contexts = [tokens for tokens, _ in row.curve]
        whole = [(fixed + nbytes) / _GIB for _, nbytes in row.curve]
        axes.plot(
            contexts,
            whole,
            label=row.cache,
            color=f"C{number % 10}",
            marker=MARKERS[number % len(MARKERS)],
            markevery=4,
            markersize=5,
            linewidth=1.2,
        )
    axes.axhline(fixed / _GIB, color="grey", linestyle=":", linewidth=1, label="without a cache")
    if settings["memory"] is not None:
        axes.axhline(settings["memory"] / _GIB, color="black", linestyle="--", linewidth=1, label="memory")
    if positions is not None and positions <= max(tokens for row in report.rows for tokens, _ in row.curve):
        axes.axvline(positions, color="black", linestyle="-.", linewidth=1, label="the model's positions")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    batch = settings["batch"]
    axes.set_xlabel("tokens in the cache" if batch == 1 else f"tokens of each of {batch} sequences in the cache")
    axes.set_ylabel("GiB of weights and cache")
    axes.set_title(f"{settings['model']['architecture']}, {settings['model']['dtype']}", loc="left", fontsize=10)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize="small")
    return figure

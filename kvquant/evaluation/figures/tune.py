"""The picture of `kvquant tune`: the trade-off between bits and KL divergence, and what each layer gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvquant.evaluation.figures import MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvquant.evaluation.tuning.report import TuneReport

#: Inches that a layer takes, at least and at most.
_NARROW, _WIDE = 0.16, 0.5
#: Most layers whose numbers are all written.
_NAMED = 20


def draw(report: TuneReport) -> Figure:
    """Draw KL divergence against bits (above), and the widths that each layer's keys and values get (below).

    Lines are predicted, for the best assignments and for uniform ones; points were measured on held-out text.
    """
    from matplotlib.figure import Figure

    layers = len(report.streams) // 2
    width = max(7.0, 1.5 + layers * max(_NARROW, min(_WIDE, 14 / layers)))
    figure = Figure(figsize=(width, 6.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(4, 1))
    _trade_off(above, report)
    _widths(below, report)
    return figure


def _trade_off(axes: Axes, report: TuneReport) -> None:
    curve = [point for point in report.curve if point.predicted > 0]
    axes.plot(
        [point.bits for point in curve],
        [1000 * point.predicted for point in curve],
        color="C0",
        linewidth=1.2,
        label="tuned, predicted",
    )
    uniform = [point for point in report.uniform if point.predicted > 0]
    axes.plot(
        [point.bits for point in uniform],
        [1000 * point.predicted for point in uniform],
        color="grey",
        linestyle="--",
        linewidth=1,
        marker=".",
        label="one width everywhere, predicted",
    )
    for point in uniform:
        place: dict[str, Any] = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8, "color": "grey"}
        axes.annotate(f"{point.nbits:g}", (point.bits, 1000 * point.predicted), **place)
    for number, row in enumerate(report.rows):
        value, low, high = (1000 * (one or 0.0) for one in (row.kl.value, row.kl.low, row.kl.high))
        if value <= 0:
            continue
        bar = None if row.kl.low is None else [[max(0.0, value - low)], [max(0.0, high - value)]]
        style: dict[str, Any] = {"marker": MARKERS[number], "color": f"C{number}", "linestyle": "none", "capsize": 2}
        axes.errorbar([row.bits_per_element], [value], yerr=bar, label=f"{row.cache}, held-out text", **style)
    axes.axvline(report.settings["budget"]["bits"], color="black", linestyle=":", linewidth=1, label="budget")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("bits per element of what is quantised")
    axes.set_ylabel("KL divergence to full precision, 1/1000 nat")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8)


def _widths(axes: Axes, report: TuneReport) -> None:
    layers = list(dict.fromkeys(row.layer for row in report.streams))
    given = [[row.nbits for row in report.streams if row.stream == stream] for stream in ("key", "value")]
    widths = report.settings["widths"]
    numbers = [[widths.index(nbits) for nbits in row] for row in given]
    axes.imshow(numbers, cmap="Blues", vmin=-0.5, vmax=len(widths) + 0.5, aspect="auto")
    for line, row in enumerate(given):
        for at, nbits in enumerate(row):
            colour = "white" if 2 * numbers[line][at] > len(widths) else "black"
            axes.text(at, line, f"{nbits:g}", ha="center", va="center", fontsize=8, color=colour)
    step = 1 if len(layers) <= _NAMED else 4
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    axes.set_yticks([0, 1], ["keys", "values"], fontsize=8)
    axes.set_xlabel(f"layer, and the bits of its keys and values, {report.rows[0].cache}", fontsize=9)

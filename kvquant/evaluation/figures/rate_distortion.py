"""The picture of `kvquant rate-distortion`: distortion against bits, and Shannon's bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvquant.evaluation.figures import MARKERS
from kvquant.evaluation.figures.names import write_names
from kvquant.evaluation.figures.perplexity import family

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvquant.evaluation.rate_distortion import RateDistortionReport, RateDistortionRow

#: What kinds of states and streams are called in headings.
STATES = {"gaussian": "unit Gaussian states", "outliers": "states with outlier channels"}
STREAMS = {"key": "keys", "value": "values"}


def draw(report: RateDistortionReport) -> Figure:
    """Draw the logarithm of the distortion against bits per element, a panel for each kind of states and stream.

    Widths of one method are joined by a line that bears its name. The bound is a grey line; below it nothing can be.
    """
    from matplotlib.figure import Figure

    shown = list(dict.fromkeys((row.states, row.stream) for row in report.rows))
    families = list(dict.fromkeys(family(row.cache) for row in report.rows))
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel, (kind, stream) in zip(panels.flat, shown, strict=False):
        rows = [row for row in report.rows if (row.states, row.stream) == (kind, stream)]
        _panel(panel, rows, report.bounds[kind], families)
        panel.set_title(f"{STATES[kind]} as {STREAMS[stream]}", loc="left", fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("bits per element, all that is stored")
    for panel in panels[:, 0]:
        panel.set_ylabel("squared error over variance")
    return figure


def _panel(
    panel: Axes, rows: Sequence[RateDistortionRow], bound: Sequence[Sequence[float]], families: list[str]
) -> None:
    rates = [row.bits_per_element for row in rows]
    lowest, highest = min(row.distortion for row in rows) / 4, max(1.0, *(row.distortion for row in rows)) * 1.5
    panel.set_yscale("log")
    panel.set_ylim(lowest, highest)
    panel.set_xlim(0, max(rates) * 1.05)
    seen = [(rate, distortion) for rate, distortion in bound if distortion >= lowest]
    panel.plot(*zip(*seen, strict=True), color="0.45", linewidth=1.5, linestyle="--", zorder=1)
    ends: list[tuple[float, float, str, str]] = [(*seen[-1], "Shannon's bound", "0.35")]
    for index, name in enumerate(families):
        points = sorted((row.bits_per_element, row.distortion) for row in rows if family(row.cache) == name)
        if points:
            look: dict[str, Any] = {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)]}
            panel.plot(*zip(*points, strict=True), markersize=4.5, linewidth=1, **look)
            ends.append((*points[-1], name, look["color"]))
    panel.grid(visible=True, which="major", alpha=0.3)
    write_names(panel, ends)

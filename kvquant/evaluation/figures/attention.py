"""The picture of `kvquant eval attention`: error of attention's output, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvquant.evaluation.figures import MARKERS
from kvquant.evaluation.figures.names import write_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvquant.evaluation.attention import AttentionReport


def draw(report: AttentionReport) -> Figure:
    """Draw the relative error of attention's output against the layer, a line for each cache and a panel a context."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    contexts = list(dict.fromkeys(row.context for row in report.rows))
    figure = Figure(figsize=(9 * len(contexts), 4.6), layout="constrained")
    panels = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    named = []
    for panel, context in zip(panels, contexts, strict=True):
        ends: list[tuple[float, float, str, str]] = []
        rows = [row for row in report.rows if row.context == context and row.output.value > 0]
        panel.set_yscale("log")
        for index, row in enumerate(rows):
            numbers = [errors.layer for errors in row.layers]
            outputs = [100 * errors.output for errors in row.layers]
            look: dict[str, Any] = {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)]}
            panel.plot(numbers, outputs, markersize=4.5, linewidth=1, **look)
            ends.append((float(numbers[-1]), outputs[-1], row.cache, look["color"]))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("layer")
        panel.set_title(f"{context} tokens", loc="left", fontsize=10)
        panel.grid(visible=True, which="major", alpha=0.3)
        named.append((panel, ends))
    for panel, ends in named:  # once the scale that panels share is that of all lines
        write_names(panel, ends)
    panels[0].set_ylabel("error of attention's output, %")
    return figure

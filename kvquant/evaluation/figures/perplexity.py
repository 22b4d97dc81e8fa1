"""The picture of `kvquant eval perplexity`: KL divergence against bits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvquant.evaluation.figures import MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvquant.evaluation.perplexity import PerplexityReport, PerplexityRow


def family(label: str) -> str:
    """Return a cache's name without its bits, which is what a line through several widths stands for."""
    return re.sub(r"(?<=[a-z]):\d+", "", label, count=1)


def draw(report: PerplexityReport) -> Figure:
    """Draw KL divergence to full precision against bits per element, one panel for each context.

    Widths of one method are joined by a line; bars are confidence intervals.
    """
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.kl.value > 0 and row.bits_per_element is not None]
    contexts = list(dict.fromkeys(row.context for row in report.rows))
    families = list(dict.fromkeys(family(row.cache) for row in rows))
    figure = Figure(figsize=(1.5 + 4.2 * len(contexts), 4.4 + 0.22 * max(0, len(families) - 6)), layout="constrained")
    panels = figure.subplots(1, len(contexts), sharex=True, sharey=True, squeeze=False)[0]
    for panel, context in zip(panels, contexts, strict=True):
        for index, name in enumerate(families):
            points = [row for row in rows if row.context == context and family(row.cache) == name]
            _line(panel, name, sorted(points, key=lambda row: row.bits_per_element or 0), index)
        panel.set_title(f"{context} tokens", loc="left", fontsize=10)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("bits per element of what is quantised")
        panel.grid(visible=True, which="major", alpha=0.3)
    panels[0].set_ylabel("KL divergence to full precision, 1/1000 nat")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=min(3, max(1, len(labels))), fontsize=8, frameon=False
    )
    return figure


def _line(panel: Axes, name: str, points: Sequence[PerplexityRow], index: int) -> None:
    values = [1000 * row.kl.value for row in points]
    lows = [1000 * max(0.0, row.kl.value - row.kl.low) if row.kl.low is not None else 0.0 for row in points]
    highs = [1000 * max(0.0, row.kl.high - row.kl.value) if row.kl.high is not None else 0.0 for row in points]
    bits: list[Any] = [row.bits_per_element for row in points]
    style: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "color": f"C{index % 10}"}
    panel.errorbar(bits, values, yerr=[lows, highs], label=name, markersize=5, linewidth=1, capsize=2, **style)

"""The picture of `kvquant eval needle`: keys retrieved over context length and depth, a heat map for each cache."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvquant.evaluation.needle import NeedleReport, NeedleRow

#: Panels side by side at most.
_ACROSS = 4
#: Inches of a cell, and of what surrounds the cells of a panel.
_CELL, _AROUND = (0.5, 0.3), (1.0, 0.9)
#: A value from which on the colour is so light that black is read on it, in per cent.
_LIGHT = 60


def draw(report: NeedleReport) -> Figure:
    """Draw the share of keys retrieved, context length by depth, one panel for each cache; the number in every cell."""
    from matplotlib.figure import Figure

    caches = list(dict.fromkeys(row.cache for row in report.rows))
    contexts, depths = len(report.rows) // len(caches), len(report.rows[0].depths)
    down = math.ceil(len(caches) / _ACROSS)
    across = math.ceil(len(caches) / down)
    width, height = _AROUND[0] + _CELL[0] * max(3, contexts), _AROUND[1] + _CELL[1] * max(3, depths)
    figure = Figure(figsize=(1.2 + across * width, 0.4 + down * height), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    image: Any = None
    for number, panel in enumerate(panels.flat):
        if number >= len(caches):
            panel.set_visible(False)
            continue
        image = _heat_map(panel, [row for row in report.rows if row.cache == caches[number]], width)
        if number % across == 0:
            panel.set_ylabel("depth, % of the haystack", fontsize=8)
        if number + across >= len(caches):
            panel.set_xlabel("tokens", fontsize=8)
    bar = figure.colorbar(image, ax=panels, fraction=0.15 / across, shrink=1 / down, pad=0.02)
    bar.set_label("keys retrieved, %", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def _heat_map(panel: Any, rows: Sequence[NeedleRow], width: float) -> Any:
    """Draw one cache: a column for each context, a row for each depth, the beginning of the text at the top."""
    cells = [[100 * cell.retrieved.value for cell in row.depths] for row in rows]
    columns = list(zip(*cells, strict=True))
    image = panel.imshow(columns, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for depth, values in enumerate(columns):
        for context, value in enumerate(values):
            colour = "black" if value >= _LIGHT else "white"
            panel.text(context, depth, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    panel.set_xticks(range(len(rows)), [_short(row.context) for row in rows], fontsize=8)
    panel.set_yticks(range(len(columns)), [str(cell.depth) for cell in rows[0].depths], fontsize=8)
    panel.set_title(_folded(rows[0].cache, int(width * 12)), loc="left", fontsize=8)
    return image


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _folded(label: str, width: int) -> str:
    """Break a label in front of its options where it is too long for a line."""
    lines = [""]
    for part in re.split(r"(?=:)", label):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)

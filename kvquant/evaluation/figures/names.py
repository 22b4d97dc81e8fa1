"""Names beside the lines that they belong to, in place of a legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Distance between two names at least, as a share of a panel's height.
_APART = 0.055


def write_names(panel: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names right of a panel, each at the height of its line's end or as near to it as the others let it.

    Args:
        panel: with its scales and limits, which must not change any more.
        ends: x and y of a line's end, its name and its colour.
    """
    from scipy.optimize import isotonic_regression

    if not ends:
        return
    panel.autoscale_view()
    to_share = panel.transData + panel.transAxes.inverted()
    placed = sorted((float(to_share.transform((x, y))[1]), x, y, name, color) for x, y, name, color in ends)
    # Nearest in the sense of least squares, in order, and each so far above the one before it.
    steps = [_APART * index for index in range(len(placed))]
    heights = isotonic_regression([place[0] - step for place, step in zip(placed, steps, strict=True)]).x
    for height, step, (_, x, y, name, color) in zip(heights, steps, placed, strict=True):
        line = {"arrowstyle": "-", "relpos": (0, 0.5), "color": color, "linewidth": 0.5, "alpha": 0.6, "shrinkB": 3}
        panel.annotate(
            name,
            (x, y),
            (1.03, height + step),
            textcoords="axes fraction",
            color=color,
            fontsize=7.5,
            va="center",
            arrowprops=line,
        )

"""Figures as pictures that are part of a page: sharp at every size, and the same bytes for the same figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvquant.evaluation.page.parts import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Letters are drawn as outlines, so that a page looks the same on machines with other fonts. Identifiers are made of
#: what they name, and not of what the clock says. Where a legend stands must not take a search.
_STYLE: dict[Any, Any] = {"svg.hashsalt": "kvquant", "svg.fonttype": "path", "legend.loc": "upper left"}
#: Left out of the file: they would differ between two runs, or name other sites.
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
#: Pixels an inch: at this size matplotlib's letters of 10 points are about as large as the page's.
_PIXELS = 88


def picture(draw: Callable[[], Figure], seen: str, caption: str = "") -> Picture:
    """Draw a figure in matplotlib's own style, whatever the user's settings are, and embed it as SVG."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        figure = draw()
        _plain(figure)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata=_METADATA)
    uri = f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    return Picture(uri, round(_PIXELS * figure.get_size_inches()[0]), seen, caption)


def _plain(figure: Figure) -> None:
    """Take what stands between dollar signs as text, and not as a formula: names come from users. Ticks are numbers."""
    from matplotlib.text import Text

    axes = (axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis))
    ticks = {label for axis in axes for label in axis.get_ticklabels(which="both")}
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text not in ticks:
            text.set_parse_math(False)

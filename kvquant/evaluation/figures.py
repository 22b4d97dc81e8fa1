"""Plots of what evaluations measured, as PNG files (or whatever else the file's ending asks matplotlib for)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvquant.errors import MissingExtraError, OptionValueError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvquant.evaluation.perplexity import PerplexityReport, PerplexityRow

_DPI = 150
_MARKERS = "osD^vPX*<>"


def require_matplotlib(path: Path | None) -> None:
    """Raise before long work what drawing to `path` would raise after it; None draws nothing.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionValueError: it writes no such files, or there is no such folder.
    """
    if path is None:
        return
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "pip install 'kvquant[eval]'")
    from matplotlib.figure import Figure

    endings = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in endings:
        raise OptionValueError("plot", str(path), f"a file that ends in .png, or in one of {', '.join(endings)}")
    if not path.resolve().parent.is_dir():
        raise OptionValueError("plot", str(path), "a file in a folder that exists")


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=_DPI)
    except OSError as cause:
        raise OptionValueError("plot", str(path), f"a file that can be written ({cause.strerror or cause})") from cause


# ------------------------------------------------------------------------------------------------ perplexity


def family(label: str) -> str:
    """Return a cache's name without its bits, which is what a line through several widths stands for."""
    return re.sub(r"(?<=[a-z]):\d+", "", label, count=1)


def plot_perplexity(report: PerplexityReport, path: Path) -> None:
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
            _draw(panel, name, sorted(points, key=lambda row: row.bits_per_element or 0), index)
        panel.set_title(f"{context} tokens", loc="left", fontsize=10)
        panel.set_yscale("log")
        panel.set_xlabel("bits per element of what is quantised")
        panel.grid(visible=True, which="major", alpha=0.3)
    panels[0].set_ylabel("KL divergence to full precision, nats")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=min(3, max(1, len(labels))), fontsize=8, frameon=False
    )
    _save(figure, path)


def _draw(panel: Axes, name: str, points: Sequence[PerplexityRow], index: int) -> None:
    values = [row.kl.value for row in points]
    lows = [max(0.0, row.kl.value - row.kl.low) if row.kl.low is not None else 0.0 for row in points]
    highs = [max(0.0, row.kl.high - row.kl.value) if row.kl.high is not None else 0.0 for row in points]
    bits: list[Any] = [row.bits_per_element for row in points]
    style: dict[str, Any] = {"marker": _MARKERS[index % len(_MARKERS)], "color": f"C{index % 10}"}
    panel.errorbar(bits, values, yerr=[lows, highs], label=name, markersize=5, linewidth=1, capsize=2, **style)

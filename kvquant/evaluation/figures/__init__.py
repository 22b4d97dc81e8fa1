"""Pictures of what was measured: a module for each kind of report, whose ``draw(report)`` returns a figure.

The figures need no screen. A command checks with `check_plot` before its work that it will be able to write one, and
writes it with `save`; `kvquant report` puts the same figures on its page.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from kvquant.errors import MissingExtraError
from kvquant.evaluation.outputs import check_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Dots per inch.
DPI = 150
#: One for each line of a picture, again from the start after the last; colours are matplotlib's ``C0`` to ``C9``.
MARKERS = "osD^vPX*<>"


def check_plot(path: Path | None) -> None:
    """Refuse a plot that could not be written when all is measured.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionValueError: it is no PNG file, or cannot be written.
    """
    if path is not None:
        check_writable("plot", path, ".png")
        require_matplotlib()


def require_matplotlib() -> None:
    """Raise before long work what drawing would raise after it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as cause:
        raise MissingExtraError("matplotlib", "pip install 'kvquant[eval]'") from cause


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file."""
    figure.savefig(path, dpi=DPI)

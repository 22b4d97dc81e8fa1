"""Text in columns, for the commands that answer at once: loading rich would double the time that they take."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

_GAP = "  "


def terminal_width() -> int | None:
    """Return the width of the terminal, or None where the output goes to a file or a pipe, which have none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def columns(rows: Sequence[Sequence[str]], width: int | None) -> list[list[str]]:
    """Lay out `rows` in left-aligned columns.

    Args:
        rows: cells, the same number in each row.
        width: columns of the terminal; None for lines as long as they need to be.

    Returns:
        For each row its lines, each a single one unless cells had to be wrapped to fit `width`.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None:
        # The first column stays as it is: it holds names, which are there to be copied. The others keep words whole.
        least = [max(map(_longest_word, column)) for column in zip(*rows, strict=True)]
        _shrink(widths, [widths[0], *least[1:]], width - len(_GAP) * (len(widths) - 1))
    laid_out = []
    for row in rows:
        cells = [textwrap.wrap(cell, limit) or [""] for cell, limit in zip(row, widths, strict=True)]
        lines = zip_longest(*cells, fillvalue="")
        laid_out.append([_GAP.join(map(str.ljust, line, widths)).rstrip() for line in lines])
    return laid_out


def paragraph(text: str, width: int | None, indent: str) -> list[str]:
    """Wrap `text` to `width` columns behind `indent`; words stay whole, so that commands can be copied."""
    if width is None:
        return [indent + text]
    return textwrap.wrap(
        text,
        max(width, 2 * len(indent) + 1),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _shrink(widths: list[int], least: list[int], total: int) -> None:
    """Narrow the widest columns until all fit into `total`, or none can be narrowed any more."""
    while sum(widths) > total:
        wide = [index for index, width in enumerate(widths) if width > least[index]]
        if not wide:
            return
        widths[max(wide, key=widths.__getitem__)] -= 1


def _longest_word(cell: str) -> int:
    return max(map(len, re.split(r"\s+|(?<=-)", cell)))

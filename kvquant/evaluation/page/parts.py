"""What a page is made of, in the words of its template, and how figures are written on it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from kvquant.evaluation.intervals import Estimate
from kvquant.evaluation.measure import Spread


@dataclass(frozen=True)
class Cell:
    """A figure in a table.

    Attributes:
        text: the figure.
        aside: its interval, written smaller.
    """

    text: str
    aside: str = ""


#: What stands where nothing was measured.
NOTHING = Cell("\N{EN DASH}")


@dataclass(frozen=True)
class Column:
    """A column of a table whose rows are caches.

    Attributes:
        heading: what is in it, with its unit.
        cells: cache -> figure; a cache without one gets `NOTHING`.
    """

    heading: str
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Group:
    """Columns that come from one measurement, under a heading of their own.

    Attributes:
        heading: what was measured, empty for columns that need none.
        columns: they.
    """

    heading: str
    columns: tuple[Column, ...]


def used(groups: Iterable[Group]) -> tuple[Group, ...]:
    """Return the columns in which there is a figure, and the groups in which there is such a column."""
    with_figures = (
        Group(group.heading, tuple(one for one in group.columns if any(cell != NOTHING for cell in one.cells.values())))
        for group in groups
    )
    return tuple(group for group in with_figures if group.columns)


@dataclass(frozen=True)
class Table:
    """A table whose rows are caches.

    Attributes:
        caption: what it shows.
        caches: its rows.
        groups: its columns.
        marked: rows that are pointed at.
    """

    caption: str
    caches: tuple[str, ...]
    groups: tuple[Group, ...]
    marked: frozenset[str] = frozenset()

    @classmethod
    def of(cls, caption: str, *columns: Column) -> Table:
        """Make a table without groups; its rows are the caches of the columns, those without a figure left out."""
        caches = dict.fromkeys(cache for column in columns for cache in column.cells)
        return cls(caption, tuple(caches), used([Group("", columns)]))


@dataclass(frozen=True)
class Picture:
    """A picture, embedded.

    Attributes:
        uri: a ``data:`` URI.
        width: of the picture in pixels, at which its letters are as large as the page's.
        seen: what is seen in it, for those who do not see it.
        caption: a line below it.
    """

    uri: str
    width: int
    seen: str
    caption: str = ""


@dataclass(frozen=True)
class Origin:
    """Where figures come from.

    Attributes:
        file: name of the file.
        command: what measured them, as far as the file knows it.
        machine: on what, in a line.
        settings: everything that they depend on, as JSON.
    """

    file: str
    command: str
    machine: str
    settings: str


@dataclass(frozen=True)
class Section:
    """What one measurement found.

    Attributes:
        anchor: what links to it name.
        title, subtitle: what was measured, and on which model.
        lead: sentences on what is shown.
        pictures, tables: they.
        notes: sentences below them.
        origins: where all of it comes from.
    """

    anchor: str
    title: str
    subtitle: str = ""
    lead: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    origins: tuple[Origin, ...] = ()


# ------------------------------------------------------------------------------------------------ figures as text


def number(value: float | None, form: str = "{:.2f}", factor: float = 1) -> Cell:
    """Return a figure, `NOTHING` for None."""
    return NOTHING if value is None else Cell(_text(factor * value, form))


def estimate(value: Estimate | None, form: str, factor: float = 1) -> Cell:
    """Return a figure with its interval."""
    if value is None:
        return NOTHING
    if value.low is None or value.high is None:
        return number(value.value, form, factor)
    return _spread((value.value, value.low, value.high), form, factor)


def spread(value: Spread | None, form: str, factor: float = 1) -> Cell:
    """Return a median with the lowest and the highest measurement."""
    if value is None:
        return NOTHING
    if value.count < 2:
        return number(value.median, form, factor)
    return _spread((value.median, value.low, value.high), form, factor)


def _spread(values: Sequence[float], form: str, factor: float) -> Cell:
    middle, low, high = (_text(factor * value, form) for value in values)
    return Cell(middle, f"{low} to {high}")


def _text(value: float, form: str) -> str:
    text = form.format(value)
    if "e+" in text:
        text = f"{value:,.0f}"
    return text.replace("-", "\N{MINUS SIGN}", 1) if text[:1] == "-" else text


def tokens(count: int) -> str:
    """Return a number of tokens as people write it: ``4k``, ``1,000``."""
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count:,}"


def plural(count: int, noun: str) -> str:
    """Return ``"1 window"`` or ``"2 windows"``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listing(items: Sequence[Any]) -> str:
    """Return ``"a, b and c"``."""
    texts = [str(item) for item in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


class OfContext(Protocol):
    """A row of a report that is of one context length."""

    @property
    def context(self) -> int:
        """Tokens."""


RowT = TypeVar("RowT", bound=OfContext)


def at_longest(rows: Sequence[RowT]) -> tuple[RowT, ...]:
    """Return the rows of the longest context; there is a row at least."""
    longest = max(row.context for row in rows)
    return tuple(row for row in rows if row.context == longest)


def shortened(text: str, width: int = 400) -> str:
    """Return a description that nobody must listen to for ever."""
    return textwrap.shorten(text, width, placeholder=" …")

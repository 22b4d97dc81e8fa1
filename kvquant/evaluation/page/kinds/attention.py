"""What a page shows of `kvquant eval attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvquant.evaluation.attention import AttentionReport, AttentionRow
from kvquant.evaluation.page.commands import evaluation_options, settings_of
from kvquant.evaluation.page.parts import (
    Column,
    Group,
    Table,
    at_longest,
    estimate,
    listing,
    number,
    plural,
    shortened,
    tokens,
)
from kvquant.evaluation.reports import ReportFile

TITLE = "Attention's output"

_LEAD = (
    "The model reads a text in full precision, and the queries, keys and values of every layer are kept. Each layer is "
    "then decoded anew over each cache, the last {queries} one at a time, and the output of attention is compared with "
    "that over exact states: the norm of the difference over the norm of what is exact."
)
_NOTE = (
    "Smaller figures: 95 % confidence intervals, from pieces of the text drawn again. Errors of keys and values are of "
    "the tokens that are quantised, means over layers."
)


def lead(report: AttentionReport) -> tuple[str, ...]:
    """Return what was measured."""
    return (_LEAD.format(queries=plural(report.settings["queries"], "token")),)


def tables(report: AttentionReport) -> tuple[Table, ...]:
    """Return the means over layers, and the outputs layer by layer, of each context."""
    found = []
    for context in dict.fromkeys(row.context for row in report.rows):
        rows = [row for row in report.rows if row.context == context]
        found += [_totals(rows), _layers(rows)]
    return tuple(found)


def seen(report: AttentionReport) -> str:
    """Return what the picture shows."""
    drawn = [row for row in report.rows if row.output.value > 0]
    if not drawn:
        return ""
    longest = max(row.context for row in drawn)
    each = ", ".join(f"{row.cache} {100 * row.output.value:.3g} %" for row in drawn if row.context == longest)
    contexts = listing([tokens(context) for context in dict.fromkeys(row.context for row in drawn)])
    return shortened(
        "Relative error of attention's output, on a logarithmic axis, against the layer, a line for each cache, for "
        f"contexts of {contexts} tokens. At {tokens(longest)}, means over layers: {each}.",
        900,
    )


def notes(report: AttentionReport) -> tuple[str, ...]:
    """Return what to keep in mind."""
    exact = dict.fromkeys(row.cache for row in report.rows if row.bits_per_element is None)
    return (_NOTE, f"Nothing was quantised by {listing(list(exact))}.") if exact else (_NOTE,)


def summary(report: AttentionReport) -> Group:
    """Return what the longest context says."""
    rows = at_longest(report.rows)
    return Group(
        f"Attention, {tokens(rows[0].context)} tokens, {plural(len(rows[0].windows), 'piece')}",
        (Column("error of its output, %", {row.cache: estimate(row.output, "{:.3g}", 100) for row in rows}),),
    )


def options(file: ReportFile) -> dict[str, Any]:
    """Return the options of the command."""
    settings = settings_of(file)
    return {**evaluation_options(file), "queries": settings["queries"], "windows": settings.get("windows")}


def _totals(rows: Sequence[AttentionRow]) -> Table:
    first = rows[0]
    return Table.of(
        f"{tokens(first.context)} tokens, {plural(len(first.windows), 'piece')} of the text; means over layers",
        Column("bits per element", {row.cache: number(row.bits_per_element) for row in rows}),
        Column("error of keys, %", {row.cache: number(row.key, "{:.3g}", 100) for row in rows}),
        Column("error of values, %", {row.cache: number(row.value, "{:.3g}", 100) for row in rows}),
        Column("error of attention's output, %", {row.cache: estimate(row.output, "{:.3g}", 100) for row in rows}),
    )


def _layers(rows: Sequence[AttentionRow]) -> Table:
    numbers = [one.layer for one in rows[0].layers]
    columns = (
        Column(f"layer {layer}", {row.cache: number(row.layers[at].output, "{:.3g}", 100) for row in rows})
        for at, layer in enumerate(numbers)
    )
    return Table.of(f"{tokens(rows[0].context)} tokens, layer by layer: error of attention's output, %", *columns)

"""What a page shows of `kvquant eval perplexity`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvquant.evaluation.candidates import FULL
from kvquant.evaluation.page.commands import evaluation_options, settings_of
from kvquant.evaluation.page.parts import (
    Cell,
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
from kvquant.evaluation.perplexity import PerplexityReport, PerplexityRow
from kvquant.evaluation.reports import ReportFile

TITLE = "Perplexity"

_LEAD = (
    "A text is cut into windows. Each begins with a prefill; every token behind it goes through the cache, {fed}, and "
    "what the model expects next is scored. KL divergence is that to what it expects with the full-precision cache: 0 "
    "where nothing at all has changed. First choices agree where both have the same likeliest token."
)
#: Below so many windows an interval is rough.
_FEW = 10


def lead(report: PerplexityReport) -> tuple[str, ...]:
    """Return what was measured."""
    fed = "one at a time" if report.settings.get("one_by_one") else "as one at a time would, up to rounding"
    return (_LEAD.format(fed=fed),)


def tables(report: PerplexityReport) -> tuple[Table, ...]:
    """Return a table for each context."""
    return tuple(_table([row for row in report.rows if row.context == context]) for context in _contexts(report))


def seen(report: PerplexityReport) -> str:
    """Return what the picture shows."""
    drawn = [row for row in report.rows if row.kl.value > 0 and row.bits_per_element is not None]
    if not drawn:
        return ""
    longest = drawn[-1].context
    points = ", ".join(
        f"{row.cache} {row.kl.value:.2g} nats at {row.bits_per_element:.2f} bits"
        for row in sorted(drawn, key=lambda row: row.kl.value)
        if row.context == longest
    )
    contexts = listing([tokens(context) for context in dict.fromkeys(row.context for row in drawn)])
    return shortened(
        f"KL divergence to full precision, on a logarithmic axis, against bits per element, for contexts of {contexts} "
        f"tokens. At {tokens(longest)}, from the least: {points}.",
        900,
    )


def notes(report: PerplexityReport) -> tuple[str, ...]:
    """Return what to keep in mind."""
    said = ["Smaller figures: 95 % confidence intervals, from windows drawn again with replacement."]
    few = [tokens(context) for context in _contexts(report) if _windows(report, context) < _FEW]
    if few:
        said.append(f"There are fewer than {_FEW} windows at {listing(few)}: take the intervals there as rough.")
    if any(row.one_pass for row in report.rows):
        said.append(
            "In one pass: one forward pass over quantised and dequantised states, which is not what generation does."
        )
    return tuple(said)


def summary(report: PerplexityReport) -> Group:
    """Return what the longest context says."""
    rows = at_longest(report.rows)
    others = [row for row in rows if row.cache != FULL]
    windows = plural(len(rows[0].windows), "window")
    return Group(
        f"Perplexity, {tokens(rows[0].context)} tokens, {windows}",
        (
            Column("KL to full precision, 1/1000 nat", {row.cache: estimate(row.kl, "{:.3g}", 1000) for row in others}),
            Column("first choice agrees, %", {row.cache: estimate(row.agreement, "{:.1f}", 100) for row in others}),
            Column("perplexity, change in %", {row.cache: estimate(row.change, "{:+.2f}", 100) for row in others}),
        ),
    )


def options(file: ReportFile) -> dict[str, Any]:
    """Return the options of the command."""
    settings = settings_of(file)
    return {
        **evaluation_options(file),
        "prefill": settings.get("prefill"),
        "windows": settings.get("windows"),
        "versus": settings.get("versus"),
        "one-by-one": settings.get("one_by_one"),
        "one-pass": settings.get("one_pass"),
    }


def _contexts(report: PerplexityReport) -> list[int]:
    return list(dict.fromkeys(row.context for row in report.rows))


def _windows(report: PerplexityReport, context: int) -> int:
    return min(len(row.windows) for row in report.rows if row.context == context)


def _table(rows: Sequence[PerplexityRow]) -> Table:
    first = rows[0]
    fed = f"a prefill of {first.prefill:,}, then {first.context - first.prefill:,} one at a time"
    scored = f"{plural(len(first.windows), 'window')}, {first.tokens:,} scored tokens"
    others = [row for row in rows if row.cache != FULL]
    passes = {row.cache: row.one_pass for row in others if row.one_pass is not None}
    return Table.of(
        f"{tokens(first.context)} tokens: {fed}; {scored}",
        Column("bits per element", {row.cache: number(row.bits_per_element) for row in rows}),
        Column("bits, whole cache", {row.cache: number(row.cache_bits_per_element) for row in rows}),
        Column("perplexity", {row.cache: estimate(row.perplexity, "{:.3f}") for row in rows}),
        Column("less that of full precision", {row.cache: estimate(row.difference, "{:+.3f}") for row in others}),
        Column("KL to it, 1/1000 nat", {row.cache: estimate(row.kl, "{:.3g}", 1000) for row in others}),
        Column("KL over that of --versus", {row.cache: estimate(row.kl_ratio, "{:.3g}") for row in others}),
        Column("first choice agrees, %", {row.cache: estimate(row.agreement, "{:.2f}", 100) for row in others}),
        Column("KL in one pass", {cache: Cell(f"{1000 * one['kl']:.3g}") for cache, one in passes.items()}),
        Column(
            "agrees in one pass, %", {cache: Cell(f"{100 * one['agreement']:.2f}") for cache, one in passes.items()}
        ),
    )

"""What a page shows of `kvquant eval needle`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvquant.evaluation.candidates import FULL
from kvquant.evaluation.needle import NeedleReport, NeedleRow
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

TITLE = "Needle in a haystack"


def lead(report: NeedleReport) -> tuple[str, ...]:
    """Return what was measured."""
    settings = report.settings
    fed = "The answer goes" if settings.get("prefill_question") else "Question and answer go"
    what = (
        "A key is stated somewhere in a long text and asked for at its end. It is retrieved where greedy generation "
        f"says all of it. {fed} through the cache, what stands before in one pass."
    )
    distractors = settings.get("distractors")
    return (what, f"Keys of other names in the text: {distractors}.") if distractors else (what,)


def tables(report: NeedleReport) -> tuple[Table, ...]:
    """Return a table for each context."""
    contexts = dict.fromkeys(row.context for row in report.rows)
    return tuple(_table([row for row in report.rows if row.context == context]) for context in contexts)


def seen(report: NeedleReport) -> str:
    """Return what the picture shows."""
    caches = dict.fromkeys(row.cache for row in report.rows)
    contexts = listing([tokens(context) for context in dict.fromkeys(row.context for row in report.rows)])
    shares = ", ".join(f"{cache} {100 * _share(report, cache):.0f} %" for cache in caches)
    return shortened(
        f"A heat map for each of {plural(len(caches), 'cache')}: keys retrieved, by contexts of {contexts} tokens and "
        f"by depth. Over all of them: {shares}.",
        900,
    )


def notes(report: NeedleReport) -> tuple[str, ...]:
    """Return what to keep in mind."""
    said = ["Smaller figures: 95 % confidence intervals, Wilson's for keys, from questions drawn again for others."]
    if all(row.retrieved.value == 1 for row in report.rows):
        said.append("All keys are retrieved; the negative log-likelihood of the answers still tells caches apart.")
    return tuple(said)


def summary(report: NeedleReport) -> Group:
    """Return what the longest context says."""
    rows = at_longest(report.rows)
    return Group(
        f"Needle, {tokens(rows[0].context)} tokens, {plural(rows[0].questions, 'question')}",
        (Column("keys retrieved, %", {row.cache: estimate(row.retrieved, "{:.0f}", 100) for row in rows}),),
    )


def options(file: ReportFile) -> dict[str, Any]:
    """Return the options of the command."""
    settings = settings_of(file)
    return {
        **evaluation_options(file),
        "depths": settings.get("depths"),
        "trials": settings.get("trials"),
        "digits": settings.get("digits"),
        "distractors": settings.get("distractors"),
        "needle": settings.get("needle"),
        "question": settings.get("question"),
        "prefill-question": settings.get("prefill_question"),
        "one-by-one": settings.get("one_by_one"),
    }


def _share(report: NeedleReport, cache: str) -> float:
    rows = [row for row in report.rows if row.cache == cache]
    return sum(row.retrieved.value * row.questions for row in rows) / sum(row.questions for row in rows)


def _table(rows: Sequence[NeedleRow]) -> Table:
    first = rows[0]
    others = [row for row in rows if row.cache != FULL]
    depths = [_at_depth(rows, place) for place in range(len(first.depths)) if len(first.depths) > 1]
    return Table.of(
        f"{tokens(first.context)} tokens, {plural(first.questions, 'question')}: keys retrieved at each depth, "
        "in % of the text before them",
        Column("bits per element", {row.cache: number(row.bits_per_element) for row in rows}),
        Column("bits, whole cache", {row.cache: number(row.cache_bits_per_element) for row in rows}),
        Column("keys retrieved, %", {row.cache: estimate(row.retrieved, "{:.0f}", 100) for row in rows}),
        *depths,
        Column("digits right, %", {row.cache: estimate(row.digits, "{:.0f}", 100) for row in rows}),
        Column("\N{MINUS SIGN}log p of the answer, nat", {row.cache: estimate(row.nll, "{:.3g}") for row in rows}),
        Column("KL, 1/1000 nat", {row.cache: estimate(row.kl, "{:.3g}", 1000) for row in others}),
        Column("first choice agrees, %", {row.cache: estimate(row.agreement, "{:.1f}", 100) for row in others}),
    )


def _at_depth(rows: Sequence[NeedleRow], place: int) -> Column:
    found = {row.cache: number(row.depths[place].retrieved.value, "{:.0f}", 100) for row in rows}
    return Column(f"at {rows[0].depths[place].depth}\N{NO-BREAK SPACE}%", found)

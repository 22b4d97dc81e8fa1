"""What a page shows of `kvquant eval longbench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvquant.evaluation.candidates import FULL
from kvquant.evaluation.intervals import Estimate
from kvquant.evaluation.longbench.report import LongBenchReport, LongBenchRow
from kvquant.evaluation.longbench.tasks import METRIC_NAMES, OVERALL
from kvquant.evaluation.page.commands import evaluation_options, settings_of
from kvquant.evaluation.page.parts import Cell, Column, Group, Table, estimate, listing, number, plural, shortened
from kvquant.evaluation.reports import ReportFile

TITLE = "LongBench"

#: Below so many questions an interval is rough.
_FEW = 10
_NOTE = (
    "Smaller figures: 95 % confidence intervals, from questions drawn again within their task; none where all of them "
    "came out alike. KL divergence and agreement are along full precision's answers, behind their first token, which "
    "the prefill alone decides."
)


def lead(report: LongBenchReport) -> tuple[str, ...]:
    """Return what was measured."""
    asked = sum(row.questions for row in _tasks(report) if row.cache == FULL)
    tasks = len(_names(report))
    chat = "as a chat where the benchmark does so" if report.settings.get("chat") else "as text"
    what = (
        f"{plural(asked, 'question')} of {plural(tasks, 'task')}, by the benchmark's own protocol: prompts {chat}, "
        "greedy answers, each task's metric. Scores are from 0 to 100."
    )
    return (what,)


def tables(report: LongBenchReport) -> tuple[Table, ...]:
    """Return figures over all tasks, scores and KL divergences by task, and what others published."""
    others = [row for row in _tasks(report) if row.cache != FULL]
    shown = [_overall(report)]
    if len(_names(report)) > 1:
        shown.append(_by_task("Score by task", _tasks(report), lambda row: _estimate(row.score, "{:.1f}")))
        shown.append(_by_task("KL to full precision by task, 1/1000 nat", others, _kl))
    shown += [_by_length(report), _published(report)]
    return tuple(table for table in shown if table.groups)


def seen(report: LongBenchReport) -> str:
    """Return what the picture shows."""
    scores = ", ".join(f"{row.cache} {row.score.value:.1f}" for row in _whole(report))
    return shortened(
        "Scores from 0 to 100, and KL divergence to full precision, a point for each cache on "
        f"{listing(_names(report))}. {_over(report)}: {scores}.",
        900,
    )


def notes(report: LongBenchReport) -> tuple[str, ...]:
    """Return what to keep in mind."""
    said = [_NOTE]
    full = [row for row in _tasks(report) if row.cache == FULL]
    few = [row.task for row in full if row.questions < _FEW]
    if few:
        said.append(f"There are fewer than {_FEW} questions of {listing(few)}: take the intervals there as rough.")
    cut = [f"{row.truncated} of {row.questions} of {row.task}" for row in full if row.truncated]
    if cut:
        said.append(f"Prompts that were too long and lost their middle: {listing(cut)}.")
    sources = dict.fromkeys(one.source for row in full for one in row.published)
    if sources:
        said.append(f"Published scores were not measured here: {listing(list(sources))}.")
    return tuple(said)


def summary(report: LongBenchReport) -> Group:
    """Return what all tasks say together."""
    rows = _whole(report)
    return Group(
        f"LongBench, {plural(len(_names(report)), 'task')}, {plural(rows[0].questions, 'question')}",
        (Column("score", {row.cache: _estimate(row.score, "{:.1f}") for row in rows}),),
    )


def options(file: ReportFile) -> dict[str, Any]:
    """Return the options of the command; where its data lies is not in a file."""
    settings = settings_of(file)
    tasks = settings.get("tasks", {})
    return {
        **evaluation_options(file),
        "data": "DIR",
        "tasks": list(tasks),
        "limit": max((task.get("questions", 0) for task in tasks.values()), default=None),
        "max-length": settings.get("max_length"),
        "chat" if settings.get("chat") else "no-chat": True,
        "one-by-one": settings.get("one_by_one"),
    }


def _tasks(report: LongBenchReport) -> list[LongBenchRow]:
    return [row for row in report.rows if row.task != OVERALL]


def _names(report: LongBenchReport) -> list[str]:
    return list(dict.fromkeys(row.task for row in _tasks(report)))


def _whole(report: LongBenchReport) -> list[LongBenchRow]:
    """Return the rows over all tasks, or of the only one."""
    return [row for row in report.rows if row.task == OVERALL] or list(report.rows)


def _over(report: LongBenchReport) -> str:
    names = _names(report)
    return "Over all tasks, the mean of their figures" if len(names) > 1 else f"On {names[0]}"


def _overall(report: LongBenchReport) -> Table:
    rows = _whole(report)
    others = [row for row in rows if row.cache != FULL]
    return Table.of(
        _over(report),
        Column("bits per element", {row.cache: number(row.bits_per_element) for row in rows}),
        Column("bits, whole cache", {row.cache: number(row.cache_bits_per_element) for row in rows}),
        Column("score", {row.cache: _estimate(row.score, "{:.1f}") for row in rows}),
        Column("less that of full precision", {row.cache: _estimate(row.difference, "{:+.1f}") for row in others}),
        Column("KL to it, 1/1000 nat", {row.cache: _kl(row) for row in others}),
        Column("first choice agrees, %", {row.cache: _estimate(row.agreement, "{:.1f}", 100) for row in others}),
    )


def _by_task(caption: str, rows: Sequence[LongBenchRow], cell: Callable[[LongBenchRow], Cell]) -> Table:
    first = {row.task: row for row in reversed(rows)}
    columns = (
        Column(
            f"{task} ({METRIC_NAMES.get(first[task].metric, first[task].metric)}, {first[task].questions})",
            {row.cache: cell(row) for row in rows if row.task == task},
        )
        for task in dict.fromkeys(row.task for row in rows)
    )
    return Table.of(f"{caption} (metric, questions)", *columns)


def _by_length(report: LongBenchReport) -> Table:
    """Return scores by the length of the texts in words, for the tasks that tell."""
    columns: dict[str, dict[str, Cell]] = {}
    for row in _tasks(report):
        for bucket in row.buckets:
            heading = f"{row.task}, {bucket.name} words ({bucket.questions})"
            columns.setdefault(heading, {})[row.cache] = number(bucket.score, "{:.1f}")
    return Table.of("Score by length (questions)", *(Column(heading, cells) for heading, cells in columns.items()))


def _published(report: LongBenchReport) -> Table:
    """Return what others reported for the model, a row for each cache that they had."""
    columns = (
        Column(row.task, {f"{one.cache} ({one.source})": number(one.score, "{:g}") for one in row.published})
        for row in _tasks(report)
        if row.published
    )
    return Table.of("Published for this model by others", *columns)


def _kl(row: LongBenchRow) -> Cell:
    return _estimate(row.kl, "{:.3g}", 1000)


def _estimate(value: Estimate | None, form: str, factor: float = 1) -> Cell:
    """Return a figure; where all questions came out alike, drawing them again knows no better, and so no interval."""
    if value is not None and value.low == value.high:
        return number(value.value, form, factor)
    return estimate(value, form, factor)

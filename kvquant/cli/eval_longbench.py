"""`kvquant eval longbench`: the benchmark's English and code tasks through quantised caches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvquant.cli.console import interval_text
from kvquant.cli.eval_options import (
    cache_options,
    candidates,
    interruptible,
    model,
    model_options,
    results_only,
    run_options,
)
from kvquant.cli.eval_run import deliver

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from kvquant.evaluation.intervals import Estimate
    from kvquant.evaluation.loading import LoadedModel
    from kvquant.evaluation.longbench.data import TaskData
    from kvquant.evaluation.longbench.report import LongBenchReport, LongBenchRow

#: What a cell of a table shows of a cache on a task.
Cell = Callable[["LongBenchRow"], str]


@click.command("longbench")
@model_options
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="LongBench's files, which are not shipped: dataset2prompt.json and dataset2maxlen.json of its repository "
    "(in DIR or DIR/config) and the JSONL files of its data.zip (in DIR or DIR/data).",
)
@click.option(
    "--sample",
    is_flag=True,
    help="In place of --data: a handful of questions in the benchmark's format that the shipped model can answer. "
    "They try the command; they are not the benchmark.",
)
@click.option(
    "--tasks",
    metavar="LIST",
    help="Tasks separated by commas, such as trec,samsum,triviaqa,hotpotqa,passage_retrieval_en; those of LongBench-E "
    "end in _e [default: all whose files are there].",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N questions of each task.")
@click.option(
    "--max-length",
    type=int,
    metavar="TOKENS",
    help="Tokens of a prompt at most; longer ones lose their middle [default: what the model's context holds beside "
    "the answer].",
)
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Put prompts through the tokenizer's chat template, save those of the few-shot and code tasks [default: if "
    "it has one].",
)
@cache_options
@click.option(
    "--one-by-one",
    is_flag=True,
    help="Feed full precision's answer really one token at a time where KL divergences are measured. Otherwise tokens "
    "between two flushes go together, which gives the same numbers up to rounding.",
)
@run_options
@interruptible
def longbench(
    as_json: bool,
    data: Path | None,
    sample: bool,
    tasks: str | None,
    limit: int | None,
    plot: Path | None,
    output: Path | None,
    **chosen: Any,
) -> None:
    """Ask the questions of LongBench through the caches, by the benchmark's own protocol.

    Its prompts and lengths are read from its files; a prompt that is too long loses its middle; answers are generated
    greedily and scored by the benchmark's metrics. Beside the scores stand the KL divergence of what the model expects
    along full precision's answers to what it expects with full precision, and the share of tokens whose first choice is
    the same: few questions hardly move a score. Intervals are for 95 %, from questions drawn again.
    """
    from kvquant.cli.console import progress_bar
    from kvquant.evaluation.figures import check_plot
    from kvquant.evaluation.figures import longbench as figure
    from kvquant.evaluation.journal import Journal
    from kvquant.evaluation.loading import load_model
    from kvquant.evaluation.longbench.run import LongBenchOptions, measure_longbench, plan, run_settings, work
    from kvquant.evaluation.measure import describe_machine, steady

    check_plot(plot)
    questions = _questions(data, tasks, limit, sample=sample)
    caches, left_out = candidates(chosen)
    subject, threads = model(chosen), chosen.pop("threads")
    options = LongBenchOptions(candidates=caches, **chosen)
    with results_only(), steady(threads):
        loaded = load_model(**subject)
        asker = plan(loaded, questions, options)
        with (
            Journal(output, run_settings(asker, questions, options)) as journal,
            progress_bar("Asking", work(questions, options), quiet=as_json) as progress,
        ):
            report = measure_longbench(asker, questions, options, journal, progress)
        machine = describe_machine(subject["device"])
    notes = [*left_out, *([_SAMPLE_NOTE] if sample else [])]
    deliver(
        report,
        machine,
        loaded.title,
        draw=figure.draw,
        show=lambda: _show(report, loaded, machine, notes),
        plot=plot,
        as_json=as_json,
    )


_SAMPLE_NOTE = "The questions are the shipped sample, which tries the command: its scores say nothing about LongBench."


def _questions(data: Path | None, tasks: str | None, limit: int | None, *, sample: bool) -> tuple[TaskData, ...]:
    """Read the questions asked for."""
    from kvquant.evaluation.longbench.data import LAYOUT, SAMPLE_DIR, present_tasks, read_tasks
    from kvquant.evaluation.longbench.tasks import parse_tasks

    if sample == (data is not None):
        raise click.UsageError(f"Give either --data DIR, {LAYOUT}, or --sample, which needs nothing.")
    chosen = None if tasks is None else parse_tasks(tasks)  # a misspelt task is an error whatever the folder
    folder = SAMPLE_DIR if data is None else data
    return read_tasks(folder, present_tasks(folder) if chosen is None else chosen, limit)


# ------------------------------------------------------------------------------------------------ the tables


def _show(report: LongBenchReport, loaded: LoadedModel, machine: dict[str, Any], notes: list[str]) -> None:
    from kvquant.cli.console import console, machine_line
    from kvquant.evaluation.longbench.tasks import OVERALL

    out = console()
    out.print(machine_line(machine), style="dim", markup=False)
    out.print(f"{loaded.title}, {report.settings['model']['dtype']}", markup=False)
    out.print(_by_task("Score, 0 to 100", report.rows, lambda row: _interval(row.score, "{:.1f}", between="\n")))
    for published in _published(report.rows, loaded.name):
        out.print(published)
    others = [row for row in report.rows if row.cache != "full"]
    if others:
        kl = "KL divergence to full precision, 1/1000 nat"
        out.print(_by_task(kl, others, lambda row: _kl(row, between="\n"), counts=False))
    by_length = [row for row in report.rows if row.buckets]
    if by_length:
        out.print(_by_task("Score by length in words (questions)", by_length, _lengths, counts=False))
    whole = [row for row in report.rows if row.task == OVERALL] or list(report.rows)
    out.print(_by_cache(whole))
    for line in (*notes, *_notes(report)):
        out.print(line, style="dim", markup=False)


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False)


def _titled(title: str, table: Table) -> Group:
    """Return a table under its title, which a table of its own would break where it is narrow."""
    from rich.console import Group
    from rich.text import Text

    return Group(Text(f"\n{title}", style="table.title"), table)


def _by_task(title: str, rows: Sequence[LongBenchRow], cell: Cell, *, counts: bool = True) -> Group:
    """A line for each task, a column for each cache; `counts` shows how tasks are scored, and their questions."""
    from rich.markup import escape

    from kvquant.evaluation.longbench.tasks import METRIC_NAMES

    table = _table()
    table.add_column("task", no_wrap=True)
    if counts:
        table.add_column("metric")
        table.add_column("questions", justify="right")
    caches = list(dict.fromkeys(row.cache for row in rows))
    for cache in caches:
        table.add_column(escape(re.sub(r"(?<=[a-z0-9])(?=:[a-z])", "\n", cache)), justify="right")
    for task in dict.fromkeys(row.task for row in rows):
        mine = {row.cache: row for row in rows if row.task == task}
        first = mine[caches[0]]
        if not first.metric:
            table.add_section()
        about = [METRIC_NAMES.get(first.metric, ""), str(first.questions)] if counts else []
        table.add_row(task, *about, *(cell(mine[cache]) for cache in caches))
    return _titled(title, table)


def _kl(row: LongBenchRow, between: str = " ") -> str:
    large = row.kl is not None and 1000 * (row.kl.high or row.kl.value) >= 1000
    return _interval(row.kl, "{:.0f}" if large else "{:.3g}", 1000, between)


def _lengths(row: LongBenchRow) -> str:
    return "\n".join(f"{bucket.name}: {bucket.score:.1f} ({bucket.questions})" for bucket in row.buckets)


def _interval(estimate: Estimate | None, form: str, factor: float = 1, between: str = " ") -> str:
    """Return a figure with its interval, if it has one, `between` the two."""
    if estimate is None:
        return "-"
    # Where all questions came out alike, drawing them again says that nothing else could have: it knows no better.
    if estimate.low == estimate.high:
        return form.format(factor * estimate.value)
    return interval_text(estimate, form, factor).replace(" (", f"{between}(")


def _published(rows: Sequence[LongBenchRow], name: str) -> Iterator[Group | Text]:
    """What others reported, a column for each cache that they had, and where; nothing if they reported nothing."""
    from rich.markup import escape
    from rich.text import Text

    found = {row.task: {(one.source, one.cache): one.score for one in row.published} for row in rows if row.published}
    columns = list(dict.fromkeys(column for scores in found.values() for column in scores))
    if not columns:
        return
    sources = list(dict.fromkeys(source for source, _ in columns))
    table = _table()
    table.add_column("task", no_wrap=True)
    for source, cache in columns:
        table.add_column(escape(f"{cache}\n[{sources.index(source) + 1}]"), justify="right")
    for task, scores in found.items():
        table.add_row(task, *(f"{scores[column]:g}" if column in scores else "" for column in columns))
    yield _titled(f"Published for {Path(name).name}, not measured here, over all questions", table)
    for number, source in enumerate(sources, start=1):
        yield Text(f"[{number}] {source}", style="dim")


def _by_cache(rows: Sequence[LongBenchRow]) -> Group:
    """A line for each cache: everything about it over all tasks."""
    from rich.markup import escape

    table = _table()
    table.add_column("cache", overflow="fold", min_width=18)
    for heading in (
        "bits per\nelement",
        "whole\ncache",
        "score\n",
        "less that of\nfull precision",
        "KL to it,\n1/1000 nat",
        "first choice\nagrees, %",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        bits = "-" if row.bits_per_element is None else f"{row.bits_per_element:.2f}"
        cells = [row.cache, bits, f"{row.cache_bits_per_element:.2f}", _interval(row.score, "{:.1f}")]
        if row.cache != "full":
            cells += [_interval(row.difference, "{:+.1f}"), _kl(row), _interval(row.agreement, "{:.1f}", 100)]
        table.add_row(*map(escape, cells))
    over = rows[0].task if rows[0].metric else "all tasks, the mean of their figures"
    return _titled(f"Over {over}", table)


def _notes(report: LongBenchReport) -> list[str]:
    first = (
        "In brackets: 95 % confidence intervals, from questions drawn again within their task; none where all of them "
        "came out alike. KL divergence and agreement are along full precision's answers, behind their first token, "
        "which the prefill alone decides. Bits per element are of what is quantised (codes, scales, offsets, tables), "
        "those of the whole cache with its window, its sink and spare room."
    )
    notes = [first]
    tasks = [row for row in report.rows if row.metric and row.cache == "full"]
    few = [row.task for row in tasks if row.questions < 10]
    if few:
        notes.append(f"Fewer than 10 questions of {', '.join(few)}: take the intervals there as rough.")
    cut = [f"{row.truncated} of {row.questions} of {row.task}" for row in tasks if row.truncated]
    if cut:
        notes.append(f"Prompts that were too long and lost their middle: {', '.join(cut)}.")
    exact = sorted({row.task for row in report.rows if row.metric and row.bits_per_element is None})
    if exact:
        notes.append(f"A cache without bits per element has quantised nothing yet, on {', '.join(exact)}.")
    return notes

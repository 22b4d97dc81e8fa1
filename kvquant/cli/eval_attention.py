"""`kvquant eval attention`: the error of attention's output on states recorded from a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvquant.cli.console import interval_text
from kvquant.cli.eval_options import (
    cache_options,
    interruptible,
    model_options,
    run_options,
)
from kvquant.cli.eval_run import evaluate_text, text_option

if TYPE_CHECKING:
    from rich.table import Table

    from kvquant.evaluation.attention import AttentionOptions, AttentionReport, AttentionRow
    from kvquant.evaluation.loading import LoadedModel


@click.command("attention")
@model_options
@text_option("the model reads")
@click.option("--contexts", default="1024", show_default=True, help="Tokens in the cache at the end, such as 512,4k.")
@click.option(
    "--queries",
    default=32,
    show_default=True,
    help="Tokens at the end that are decoded, and whose output is looked at.",
)
@click.option("--windows", default=4, show_default=True, help="Pieces of the text for each context at most.")
@cache_options
@run_options
@interruptible
def attention(as_json: bool, text: Path | None, plot: Path | None, output: Path | None, **chosen: Any) -> None:
    """Measure the error of attention's output on states recorded from a model, layer by layer.

    The model reads a text in full precision; queries, keys and values of every layer are kept. Each layer is then
    decoded anew over each cache: the last tokens come one at a time, and the output of attention is compared with that
    over exact states. Beside it stand the errors of keys and values alone. Intervals are for 95 %, from pieces of the
    text drawn again.
    """
    from kvquant.evaluation import attention as evaluation
    from kvquant.evaluation.figures import attention as figure

    evaluate_text(
        evaluation,
        lambda loaded, tokens, _, options, *record: evaluation.measure_attention(loaded, tokens, options, *record),
        _options,
        chosen,
        draw=figure.draw,
        show=_show,
        doing="Measuring",
        text=text,
        plot=plot,
        output=output,
        as_json=as_json,
    )


def _options(caches: Any, chosen: dict[str, Any]) -> AttentionOptions:
    from kvquant.evaluation.attention import AttentionOptions
    from kvquant.evaluation.sizes import parse_contexts

    return AttentionOptions(candidates=caches, contexts=parse_contexts(chosen.pop("contexts")), **chosen)


# ------------------------------------------------------------------------------------------------ the tables


def _show(report: AttentionReport, loaded: LoadedModel, machine: dict[str, Any], left_out: list[str]) -> None:
    from kvquant.cli.console import console, machine_line

    out = console(pipe_width=120)
    out.print(machine_line(machine), style="dim", markup=False, soft_wrap=not out.is_terminal)
    out.print(f"{loaded.title}, {report.settings['model']['dtype']}", markup=False)
    for context in dict.fromkeys(row.context for row in report.rows):
        rows = [row for row in report.rows if row.context == context]
        out.print(_totals(rows, report.settings["queries"]))
        out.print(_layers(rows))
    note = (
        "Errors are norms of the difference over norms of what is exact. Keys and values: of the tokens that are "
        "quantised. Output: of attention for the last tokens, each decoded over the cache; in brackets 95 % confidence "
        "intervals, from pieces of the text drawn again. Bits per element are of what is quantised."
    )
    for line in (*left_out, note, *_exact(report)):
        out.print(line, style="dim", markup=False)


def _exact(report: AttentionReport) -> list[str]:
    """Say which caches have quantised nothing, and what would help."""
    return [
        f"{row.cache} has quantised none of {row.context} tokens: longer --contexts, or a shorter window."
        for row in report.rows
        if row.bits_per_element is None
    ]


def _totals(rows: list[AttentionRow], queries: int) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    first = rows[0]
    pieces = "1 piece" if len(first.windows) == 1 else f"{len(first.windows)} pieces"
    title = f"\n{first.context} tokens, the last {queries} of them decoded; {pieces} of the text; means over all layers"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", overflow="fold", min_width=18)
    for heading in ("bits per\nelement", "error of\nkeys, %", "error of\nvalues, %", "error of attention's\noutput, %"):
        table.add_column(heading, justify="right")
    for row in rows:
        bits = "-" if row.bits_per_element is None else f"{row.bits_per_element:.2f}"
        errors = ("-" if error is None else f"{100 * error:.3g}" for error in (row.key, row.value))
        table.add_row(escape(row.cache), bits, *errors, interval_text(row.output, "{:.3g}", 100))
    return table


def _layers(rows: list[AttentionRow]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    title = "Layer by layer: error of attention's output, %"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    for row in rows:
        options_below = row.cache.replace(":", ":\n") if "=" in row.cache else row.cache
        table.add_column(escape(options_below), justify="right", overflow="fold")
    for same in zip(*(row.layers for row in rows), strict=True):
        table.add_row(str(same[0].layer), *(f"{100 * one.output:.3g}" for one in same))
    return table

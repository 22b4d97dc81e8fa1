"""`kvquant eval perplexity`: what a quantised cache changes about what a model expects next."""

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

    from kvquant.evaluation.loading import LoadedModel
    from kvquant.evaluation.perplexity import PerplexityOptions, PerplexityReport, PerplexityRow


@click.command("perplexity")
@model_options
@text_option("the model has not been trained on")
@click.option("--contexts", default="512,1024,2048", show_default=True, help="Tokens of a window, such as 512,4k.")
@click.option(
    "--prefill",
    type=int,
    help="Tokens of a window that are fed at once; the others are fed one at a time and scored [default: half].",
)
@click.option("--windows", type=int, help="Windows of each context at most [default: all that the text has].")
@cache_options
@click.option(
    "--versus", metavar="CACHE", help="Compare the KL divergences of the others with this one's, pair by pair."
)
@click.option(
    "--one-by-one",
    is_flag=True,
    help="Really feed one token at a time, slowly. Otherwise tokens between two flushes go through the model together, "
    "which gives the same numbers up to rounding.",
)
@click.option(
    "--one-pass",
    is_flag=True,
    help="Show as well what one forward pass over quantised and dequantised states would say, which is another thing.",
)
@run_options
@interruptible
def perplexity(as_json: bool, text: Path | None, plot: Path | None, output: Path | None, **chosen: Any) -> None:
    """Measure perplexity, KL divergence and agreement through the cache, one new token at a time.

    The text is cut into windows; each begins with a prefill, and every token behind it is fed through the cache and
    scored. Beside perplexity stand the KL divergence of what the model expects to what it expects with full precision,
    and the share of positions where its first choice is the same: on a small model perplexity hardly moves, and these
    tell caches apart. Intervals are for 95 %, from windows drawn again.
    """
    from kvquant.evaluation import perplexity as evaluation
    from kvquant.evaluation.figures import perplexity as figure

    evaluate_text(
        evaluation,
        lambda loaded, tokens, _, options, *record: evaluation.measure_perplexity(loaded, tokens, options, *record),
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


def _options(caches: Any, chosen: dict[str, Any]) -> PerplexityOptions:
    from kvquant.evaluation.perplexity import PerplexityOptions
    from kvquant.evaluation.sizes import parse_contexts

    return PerplexityOptions(candidates=caches, contexts=parse_contexts(chosen.pop("contexts")), **chosen)


# ------------------------------------------------------------------------------------------------ the tables


def _show(report: PerplexityReport, loaded: LoadedModel, machine: dict[str, Any], left_out: list[str]) -> None:
    from kvquant.cli.console import console, machine_line

    out = console()
    out.print(machine_line(machine), style="dim", markup=False)
    out.print(f"{loaded.title}, {report.settings['model']['dtype']}", markup=False)
    for context in dict.fromkeys(row.context for row in report.rows):
        rows = [row for row in report.rows if row.context == context]
        out.print(_table(rows))
    for line in (*left_out, *_notes(report)):
        out.print(line, style="dim", markup=False)


def _table(rows: list[PerplexityRow]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    first = rows[0]
    title = (
        f"\n{first.context} tokens: a prefill of {first.prefill}, then {first.context - first.prefill} one at a time; "
        f"{len(first.windows)} windows, {first.tokens} scored tokens"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", overflow="fold", min_width=18)
    versus = any(row.kl_ratio is not None for row in rows)
    columns = {
        "bits per\nelement": True,
        "whole\ncache": True,
        "perplexity\n": True,
        "less that of\nfull precision": True,
        "KL to it,\n1/1000 nat": True,
        "KL over that\nof --versus": versus,
        "first choice\nagrees, %": True,
    }
    for heading, shown in columns.items():
        if shown:
            table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*map(escape, _cells(row, versus=versus)))
        if row.one_pass is not None:
            table.add_row(*_one_pass_cells(row.one_pass, rows[0].perplexity.value, versus=versus), style="dim")
    return table


def _cells(row: PerplexityRow, *, versus: bool) -> list[str]:
    bits = "-" if row.bits_per_element is None else f"{row.bits_per_element:.2f}"
    cells = [row.cache, bits, f"{row.cache_bits_per_element:.2f}", f"{row.perplexity.value:.3f}"]
    if row.cache == "full":
        return cells
    cells += [interval_text(row.difference, "{:+.3f}"), interval_text(row.kl, "{:.3g}", 1000)]
    if versus:
        cells.append("" if row.kl_ratio is None else interval_text(row.kl_ratio, "{:.3g}"))
    return [*cells, interval_text(row.agreement, "{:.2f}", 100)]


def _one_pass_cells(scores: dict[str, float], full: float, *, versus: bool) -> list[str]:
    cells = ["  in one pass", "", "", f"{scores['perplexity']:.3f}", f"{scores['perplexity'] - full:+.3f}"]
    return [*cells, f"{1000 * scores['kl']:.3g}", *([""] if versus else []), f"{100 * scores['agreement']:.2f}"]


def _notes(report: PerplexityReport) -> list[str]:
    first = (
        "In brackets: 95 % confidence intervals, from windows drawn again. Bits per element are of what is quantised "
        "(codes, scales, offsets, tables), those of the whole cache with its window, its sink and spare room."
    )
    notes = [first]
    few = sorted({row.context for row in report.rows if len(row.windows) < 10})
    if few:
        notes.append(f"Fewer than 10 windows at {', '.join(map(str, few))}: take the intervals there as rough.")
    exact = sorted({row.context for row in report.rows if row.cache != "full" and row.bits_per_element is None})
    if exact:
        notes.append(f"A cache without bits per element has quantised nothing yet, at {', '.join(map(str, exact))}.")
    if any(row.one_pass for row in report.rows):
        notes.append(
            "'In one pass' is one forward pass over quantised and dequantised states: not what generation does."
        )
    return notes

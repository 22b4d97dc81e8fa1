"""`kvquant eval needle`: whether a key that a long text states once is found again through a quantised cache."""

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
    from kvquant.evaluation.needle import NeedleOptions, NeedleReport, NeedleRow


@click.command("needle")
@model_options
@text_option("is the haystack")
@click.option(
    "--contexts",
    default="512,1k,2k",
    show_default=True,
    help="Tokens in all, those of question and answer too, such as 512,4k.",
)
@click.option(
    "--depths",
    default="0,25,50,75,100",
    show_default=True,
    help="Where the needle is, in per cent of the haystack before it.",
)
@click.option("--trials", type=int, default=10, show_default=True, help="Questions for each context and depth.")
@cache_options
@click.option("--digits", type=int, default=5, show_default=True, help="Digits of a key.")
@click.option(
    "--distractors",
    type=int,
    default=0,
    show_default=True,
    help="Other keys that are stated under other names, at random places.",
)
@click.option(
    "--needle",
    metavar="SENTENCE",
    help="Sentence that states the key, with {key} in it [default: 'The pass key is {key}. Remember it.'].",
)
@click.option(
    "--question",
    metavar="TEXT",
    help="Text that the key must follow [default: 'What is the pass key? The pass key is'].",
)
@click.option(
    "--prefill-question",
    is_flag=True,
    help="Feed the question with the haystack in one pass, as generate does with a prompt. The question is then read "
    "with full precision, and so the answer's first token is too.",
)
@click.option(
    "--one-by-one",
    is_flag=True,
    help="Really feed question and answer one token at a time. Otherwise tokens between two flushes go through the "
    "model together, which gives the same numbers up to rounding.",
)
@run_options
@interruptible
def needle(as_json: bool, text: Path | None, plot: Path | None, output: Path | None, **chosen: Any) -> None:
    """Hide a key in a long text, ask for it at the end, and see through which caches it is found again.

    The text is prefilled; question and answer go through the cache, token by token. A key counts as retrieved where
    greedy generation says all of it. Where all caches do, how sure they are still tells them apart: the negative
    log-likelihood of the answer, and over its tokens the KL divergence to what the model expects with full precision
    and the share whose first choice is the same. Intervals are for 95 %.
    """
    from kvquant.evaluation import needle as evaluation
    from kvquant.evaluation.figures import needle as figure

    evaluate_text(
        evaluation,
        lambda loaded, _, questions, options, *record: evaluation.measure_needle(loaded, questions, options, *record),
        _options,
        chosen,
        draw=figure.draw,
        show=_show,
        doing="Asking",
        text=text,
        plot=plot,
        output=output,
        as_json=as_json,
    )


def _options(caches: Any, chosen: dict[str, Any]) -> NeedleOptions:
    from kvquant.evaluation.haystack import Sentences
    from kvquant.evaluation.needle import NeedleOptions
    from kvquant.evaluation.sizes import parse_contexts

    said = {name: chosen.pop(name) for name in ("needle", "question", "digits", "distractors")}
    sentences = Sentences(**{name: value for name, value in said.items() if value is not None})
    contexts, depths = parse_contexts(chosen.pop("contexts")), _depths(chosen.pop("depths"))
    return NeedleOptions(candidates=caches, contexts=contexts, depths=depths, sentences=sentences, **chosen)


def _depths(text: str) -> tuple[int, ...]:
    """Read depths separated by commas.

    Raises:
        OptionValueError: something else is there, or a depth comes twice.
    """
    from kvquant.errors import OptionValueError

    parts = [part.strip().removesuffix("%").rstrip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) <= 100 for part in parts) or len({*map(int, parts)}) < len(parts):
        expected = "whole per cents from 0 to 100 separated by commas, each once, such as 0,50,100"
        raise OptionValueError("depths", text, expected)
    return tuple(map(int, parts))


# ------------------------------------------------------------------------------------------------ the tables


def _show(report: NeedleReport, loaded: LoadedModel, machine: dict[str, Any], left_out: list[str]) -> None:
    from kvquant.cli.console import console, machine_line

    out = console()
    out.print(machine_line(machine), style="dim", markup=False)
    out.print(f"{loaded.title}, {report.settings['model']['dtype']}", markup=False)
    for context in dict.fromkeys(row.context for row in report.rows):
        out.print(_table([row for row in report.rows if row.context == context], report.settings))
    out.print(_grid(report))
    for line in (*left_out, *_notes(report)):
        out.print(line, style="dim", markup=False)


def _table(rows: list[NeedleRow], settings: dict[str, Any]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    depths, keys = _some(len(settings["depths"]), "depth"), _some(settings["trials"], "key")
    title = f"\n{rows[0].context} tokens, {depths}, {keys} of {_some(settings['digits'], 'digit')} at each"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", overflow="fold", min_width=18)
    for heading in (
        "bits per\nelement",
        "whole\ncache",
        "keys\nretrieved, %",
        "digits\nright, %",
        "-log p of the\nanswer, nat",
        "KL to full,\n1/1000 nat",
        "first choice\nagrees, %",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*map(escape, _cells(row)))
    return table


def _some(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _cells(row: NeedleRow) -> list[str]:
    bits = "-" if row.bits_per_element is None else f"{row.bits_per_element:.2f}"
    cells = [row.cache, bits, f"{row.cache_bits_per_element:.2f}", interval_text(row.retrieved, "{:.0f}", 100)]
    cells += [interval_text(row.digits, "{:.3g}", 100), interval_text(row.nll, "{:.3g}")]
    if row.cache == "full":
        return cells
    form = "{:.3g}" if (row.kl.high or row.kl.value) < 1 else "{:.0f}"
    return [*cells, interval_text(row.kl, form, 1000), interval_text(row.agreement, "{:.3g}", 100)]


def _grid(report: NeedleReport) -> Table:
    """Keys retrieved at every context and depth, what the picture shows."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    title = "\nKeys retrieved, %, by depth"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", overflow="fold", min_width=18)
    for heading in ("tokens", *map(str, report.settings["depths"])):
        table.add_column(heading, justify="right")
    for cache in dict.fromkeys(row.cache for row in report.rows):
        rows = [row for row in report.rows if row.cache == cache]
        for number, row in enumerate(rows):
            shares = (f"{100 * cell.retrieved.value:.0f}" for cell in row.depths)
            table.add_row("" if number else escape(cache), str(row.context), *shares)
    return table


def _notes(report: NeedleReport) -> list[str]:
    first = (
        "In brackets: 95 % confidence intervals, of shares of keys by Wilson's score, of all else from questions drawn "
        "again. Bits per element are of what is quantised (codes, scales, offsets, tables), those of the whole cache "
        "with its window, its sink and spare room."
    )
    notes = [first]
    few = sorted({row.context for row in report.rows if row.questions < 10})
    if few:
        notes.append(f"Fewer than 10 questions at {', '.join(map(str, few))}: take the intervals there as rough.")
    lost = sorted({row.context for row in report.rows if row.cache == "full" and row.retrieved.value < 0.5})
    if lost:
        notes.append(
            f"With full precision the model itself misses most keys at {', '.join(map(str, lost))}: there this says "
            "little about caches. --needle and --question may say it in words that the model knows better."
        )
    exact = sorted({row.context for row in report.rows if row.cache != "full" and row.bits_per_element is None})
    if exact:
        notes.append(f"A cache without bits per element has quantised nothing yet, at {', '.join(map(str, exact))}.")
    if report.settings["prefill_question"]:
        notes.append("The question was in the prefill: what the model makes of it has not been through the cache.")
    return notes

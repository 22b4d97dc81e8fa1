"""`kvquant tune`: which width for the keys and the values of which layer, under a budget."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvquant.cli.console import interval_text
from kvquant.cli.eval_options import (
    SHARED,
    interruptible,
    model,
    model_options,
    read_text,
    results_only,
    run_options,
    setting_options,
)
from kvquant.cli.eval_run import deliver, text_option

if TYPE_CHECKING:
    from rich.table import Table

    from kvquant.evaluation.loading import LoadedModel
    from kvquant.evaluation.tuning.report import TuneReport
    from kvquant.evaluation.tuning.tune import TuneOptions


@click.command("tune")
@model_options
@text_option("the model has not been trained on; its beginning tunes, the rest verifies")
@click.option("--budget", type=float, metavar="BITS", help="Bits per element at most, all stored bits counted.")
@click.option("--memory", metavar="SIZE", help="Or the memory that weights and cache must fit into, such as 8GB.")
@click.option("--context", help="Tokens in the cache then, such as 64k [default: the model's positions].")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once then.")
@click.option("--overhead", metavar="SIZE", help="Memory that other things take then, such as 2GB.")
@click.option(
    "--backend",
    metavar="CACHE",
    help="The cache whose bits are tuned, without bits: BACKEND[:AXIS][:OPTION=VALUE...], or a preset, whose own do "
    "not count  [default: what measured best].",
)
@click.option("--widths", metavar="N,N[,N...]", help="Bits to choose from [default: all whole ones that it has].")
@setting_options
@click.option("--length", default="1k", show_default=True, help="Tokens of a window of the text, such as 1k.")
@click.option("--prefill", type=int, help="Tokens of a window that are fed at once [default: half].")
@click.option("--windows", type=int, default=3, show_default=True, help="Windows that sensitivities are measured on.")
@click.option(
    "--verify", type=int, default=10, show_default=True, help="Windows that the result is verified on, at most."
)
@click.option(
    "--config-out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.yaml",
    help="Write a config that QuantizedCache.from_config(FILE) loads; .yaml, .yml or .json.",
)
@run_options
@interruptible
def tune(
    as_json: bool, text: Path | None, plot: Path | None, output: Path | None, config_out: Path | None, **chosen: Any
) -> None:
    """Choose the bits of each layer's keys and values, best under a budget, and write them as a config.

    Each layer's sensitivity is measured: the KL divergence to full precision with its keys, or its values, in few bits
    and everything else in the most. An integer program finds the widths with the least sum within the budget. Then the
    result is measured beside uniform caches within the same budget, on text behind that which tuned, and what is best
    there is written.
    """
    from kvquant.cli.console import progress_bar
    from kvquant.demo import HELDOUT_FILE
    from kvquant.evaluation.figures import check_plot
    from kvquant.evaluation.figures import tune as figure
    from kvquant.evaluation.journal import Journal
    from kvquant.evaluation.loading import load_model
    from kvquant.evaluation.measure import describe_machine, steady
    from kvquant.evaluation.outputs import check_writable
    from kvquant.evaluation.tuning import tune as tuning

    check_plot(plot)
    if config_out is not None:
        check_writable("config_out", config_out, ".yaml", ".yml", ".json")
    subject, threads = model(chosen), chosen.pop("threads")
    with results_only(), steady(threads):
        options = _options(chosen)
        loaded = load_model(**subject)
        tokens = loaded.encode(read_text("text", text or HELDOUT_FILE))
        prepared = tuning.prepare(loaded, tokens, options)
        with (
            Journal(output, tuning.run_settings(loaded, tokens, options, prepared.space)) as journal,
            progress_bar("Measuring", prepared.work, quiet=as_json) as progress,
        ):
            report = tuning.tune(loaded, prepared, options, journal, progress)
        machine = describe_machine(subject["device"])
    deliver(
        report,
        machine,
        loaded.title,
        draw=figure.draw,
        show=lambda: _show(report, loaded, machine),
        plot=plot,
        as_json=as_json,
    )
    if config_out is not None:
        _write_config(report, loaded, config_out)
        click.echo(f"Wrote {config_out}: {report.written}", err=True)


def _options(chosen: dict[str, Any]) -> TuneOptions:
    from kvquant.evaluation.sizes import parse_bytes, parse_tokens
    from kvquant.evaluation.tuning.space import parse_widths, tuning_options
    from kvquant.evaluation.tuning.tune import TuneOptions

    shared = {name: chosen.pop(name) for name in SHARED}
    chosen["base"] = tuning_options(chosen.pop("backend"), shared)
    read: dict[str, Callable[[str], Any]] = {
        "widths": parse_widths,
        "memory": functools.partial(parse_bytes, "memory"),
        "overhead": functools.partial(parse_bytes, "overhead"),
        "context": functools.partial(parse_tokens, "context"),
        "length": functools.partial(parse_tokens, "length"),
    }
    for name, parse in read.items():
        given = chosen.pop(name)
        if given is not None:
            chosen[name] = parse(given)
    return TuneOptions(**chosen)


# ------------------------------------------------------------------------------------------------ the config


def _write_config(report: TuneReport, loaded: LoadedModel, path: Path) -> None:
    from kvquant._version import __version__
    from kvquant.engine.config import CacheConfig
    from kvquant.errors import OptionValueError
    from kvquant.evaluation.tuning.report import numbers_line

    config = CacheConfig.from_dict(report.config)
    head = f"# {report.written}, for {loaded.title}; kvquant {__version__} tune.\n# {numbers_line(report)}\n"
    text = config.to_json() if path.suffix.lower() == ".json" else head + config.to_yaml()
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as cause:
        raise OptionValueError("config_out", str(path), f"a file that can be written ({cause})") from cause


# ------------------------------------------------------------------------------------------------ the tables


def _show(report: TuneReport, loaded: LoadedModel, machine: dict[str, Any]) -> None:
    from kvquant.cli.console import console, machine_line
    from kvquant.evaluation.tuning.report import budget_line, numbers_line, verdict

    out, settings = console(), report.settings
    out.print(machine_line(machine), style="dim", markup=False)
    out.print(f"{loaded.title}, {settings['model']['dtype']}; {budget_line(report)}", markup=False)
    out.print(_assignment(report))
    out.print(_verified(report))
    out.print(f"{numbers_line(report)}.", markup=False)
    out.print(verdict(report), markup=False)
    for line in _notes(report):
        out.print(line, style="dim", markup=False)


def _assignment(report: TuneReport) -> Table:
    from rich import box
    from rich.table import Table

    from kvquant.evaluation.page.parts import plural

    settings = report.settings
    measured = f"{plural(settings['windows'], 'window')} of {settings['length']} tokens"
    title = f"\nWhat each width adds to KL divergence, 1/1000 nat, and the bits that are best; {measured}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("\nlayer", justify="right")
    for stream in ("keys", "values"):
        table.add_column(f"{stream},\nbits", justify="right", style="bold")
        for width in settings["widths"]:
            table.add_column(f"\nat {width:g}", justify="right")
    for layer in dict.fromkeys(row.layer for row in report.streams):
        cells = [str(layer)]
        for row in (row for row in report.streams if row.layer == layer):
            cells += [f"{row.nbits:g}", *(f"{1000 * added:.3g}" for added in row.added)]
        table.add_row(*cells)
    return table


def _verified(report: TuneReport) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from kvquant.evaluation.page.parts import plural
    from kvquant.evaluation.tuning.report import ratio_text

    settings = report.settings
    title = f"Held-out text, {plural(settings['verify'], 'window')}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", overflow="fold", min_width=16)
    headings = (
        "bits per\nelement",
        "KL predicted,\n1/1000 nat",
        "KL to full precision,\n1/1000 nat",
        "tuned\nover it",
        "first choice\nagrees, %",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in report.rows:
        cells = [row.cache, f"{row.bits_per_element:.3f}", f"{1000 * row.predicted:.3g}"]
        cells.append(interval_text(row.kl, "{:.3g}", 1000))
        cells.append("" if row.ratio is None else ratio_text(row.ratio))
        table.add_row(*map(escape, [*cells, interval_text(row.agreement, "{:.2f}", 100)]))
    return table


def _notes(report: TuneReport) -> list[str]:
    from kvquant.engine.memory import format_bytes

    settings = report.settings
    widest = f"{settings['widest']:g}"
    first = (
        f"Each was measured with {widest} bits everywhere else, less the KL divergence with {widest} bits everywhere, "
        f"{1000 * report.floor:.3g}. That they add up is an assumption; held-out text is the check. "
        "In brackets: 95 % confidence intervals, from windows drawn again."
    )
    notes = [first]
    if settings["verify"] < 10:
        notes.append("Fewer than 10 windows: take the intervals as rough.")
    budget = settings["budget"]
    if budget["memory"] is not None:
        total = budget["weights"] + budget["overhead"] + budget["takes"][report.written]
        notes.append(
            f"Weights and cache ({report.written}) take {format_bytes(total)} of {format_bytes(budget['memory'])} "
            f"at {budget['context']:,} tokens."
        )
    return notes

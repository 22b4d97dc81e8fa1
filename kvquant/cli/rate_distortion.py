"""``kvquant rate-distortion``: how near every backend comes to Shannon's bound, all stored bits counted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvquant.cli.eval_options import SHARED, interruptible, results_only, run_options, setting_options
from kvquant.cli.eval_run import deliver

if TYPE_CHECKING:
    from rich.table import Table

    from kvquant.evaluation.rate_distortion import RateDistortionOptions, RateDistortionReport, RateDistortionRow


@click.command("rate-distortion")
@click.option(
    "--backends",
    metavar="LIST",
    help="Caches to measure, separated by commas: BACKEND[:NBITS...][:AXIS][:OPTION=VALUE...] with any backend and "
    "option of kvquant, a preset such as kivi-2, or transformers' own as transformers:quanto:4. One without bits "
    "stands for all whole widths that it has. For example lloydmax,reference:2:scale=error:rotation_value=hadamard."
    "  [default: every backend that can be used here]",
)
@click.option(
    "--states",
    metavar="KIND[,KIND]",
    default="gaussian,outliers",
    show_default=True,
    help="Kinds of states: unit normal, and with one channel in sixteen 10 to 20 times larger.",
)
@click.option(
    "--streams",
    metavar="STREAM[,STREAM]",
    default="key,value",
    show_default=True,
    help="What the states are to the cache: key, value.",
)
@click.option("--tokens", default=4096, show_default=True, help="Tokens of the states.")
@click.option("--heads", default=4, show_default=True, help="Key/value heads of the states.")
@click.option("--head-dim", default=64, show_default=True, help="Channels of a head.")
@setting_options
@click.option("--device", default="cpu", show_default=True, help="torch device.")
@click.option("--threads", type=click.IntRange(min=1), help="torch's threads.")
@run_options
@interruptible
@click.pass_context
def rate_distortion(
    ctx: click.Context, /, as_json: bool, plot: Path | None, output: Path | None, threads: int | None, **chosen: Any
) -> None:
    """Measure squared error against bits per element, beside Shannon's bound.

    No code whatever has for Gaussian numbers less error than D = 2**(-2R) of their variance at R bits for each. The gap
    is what a cache stores above that: codes, scales, offsets and tables. Where channels differ, the bound is that of
    the best division of bits among them. Exit code 1 if nothing could be measured.
    """
    from kvquant.cli.console import progress_bar
    from kvquant.evaluation.figures import check_plot
    from kvquant.evaluation.figures import rate_distortion as figure
    from kvquant.evaluation.journal import Journal
    from kvquant.evaluation.measure import describe_machine, steady
    from kvquant.evaluation.rate_distortion import measure_rate_distortion

    check_plot(plot)
    with results_only(), steady(threads):
        options, left_out = _options(chosen)
        with (
            Journal(output, options.settings()) as journal,
            progress_bar("Measuring", options.work, quiet=as_json) as progress,
        ):
            report = measure_rate_distortion(options, journal, progress, left_out)
        machine = describe_machine(options.device)
    deliver(
        report,
        machine,
        "synthetic states",
        draw=figure.draw,
        show=lambda: _show(report, machine),
        plot=plot if report.rows else None,
        as_json=as_json,
    )
    if not report.rows:
        ctx.exit(1)


def _options(chosen: dict[str, Any]) -> tuple[RateDistortionOptions, dict[str, str]]:
    from kvquant.engine.config import CacheConfig
    from kvquant.engine.settings import check_device
    from kvquant.evaluation.plan import planned_candidates
    from kvquant.evaluation.rate_distortion import RateDistortionOptions, every_backend

    check_device(CacheConfig(device=chosen["device"]))
    backends, shared = chosen.pop("backends"), {name: chosen.pop(name) for name in SHARED}
    left_out: dict[str, str] = {}
    if backends is None:
        caches, left_out = every_backend(shared)
    else:
        caches = planned_candidates(backends, shared=shared)
    for name in ("states", "streams"):
        chosen[name] = tuple(part.strip() for part in chosen[name].split(","))
    return RateDistortionOptions(candidates=caches, **chosen), left_out


# ------------------------------------------------------------------------------------------------ the tables


def _show(report: RateDistortionReport, machine: dict[str, Any]) -> None:
    from kvquant.cli.console import console, machine_line
    from kvquant.cli.describe import clean

    out = console(pipe_width=120)
    out.print(machine_line(machine), style="dim", markup=False, soft_wrap=not out.is_terminal)
    for kind in dict.fromkeys(row.states for row in report.rows):
        out.print(_table([row for row in report.rows if row.states == kind]))
    settings = report.settings
    shape = f"[1, {settings['heads']}, {settings['tokens']}, {settings['head_dim']}]"
    note = (
        f"States {shape}. Bits per element count codes, scales, offsets and tables of what is quantised. Error is "
        "squared error over variance. The bound is the least number of bits with which that error is possible; the gap "
        "is what a cache takes above it."
    )
    notes = [
        note,
        *(f"{clean(name)} is left out: {clean(why).removesuffix('.')}." for name, why in report.left_out.items()),
    ]
    for line in notes:
        out.print(line, style="dim", markup=False)


def _table(rows: list[RateDistortionRow]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from kvquant.evaluation.figures.rate_distortion import STATES, STREAMS

    table = Table(title=f"\n{STATES[rows[0].states]}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", overflow="fold", min_width=18)
    table.add_column("stream,\naxis")
    for heading in ("bits per\nelement", "error\n", "SNR,\ndB", "bound,\nbits", "gap,\nbits"):
        table.add_column(heading, justify="right")
    for row in rows:
        stream = ", ".join([STREAMS[row.stream], *([row.axis] if row.axis else [])])
        figures = (f"{row.distortion:.4g}", f"{row.snr:.2f}", f"{row.bound:.2f}", f"{row.gap:.2f}")
        table.add_row(escape(row.cache), stream, f"{row.bits_per_element:.2f}", *figures)
    return table

"""``kvquant compare-backends``: bits, error and speed of every backend, side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from kvquant.cli.console import console, machine_line, progress_bar
from kvquant.cli.describe import clean, quietly

if TYPE_CHECKING:
    from kvquant.evaluation.distortion import Distortion, DistortionReport
    from kvquant.evaluation.measure import Spread

#: Columns of the table, in the terminal and in Markdown.
HEADINGS = (
    "backend",
    "bits",
    "axis",
    "bits per element",
    "error, Gaussian",
    "error, outlier channels",
    "quantise M/s (ratio)",
    "dequantise M/s (ratio)",
)


@click.command("compare-backends")
@click.option(
    "--backends",
    metavar="LIST",
    help="What to compare, separated by commas, each BACKEND[:NBITS][:AXIS][:OPTION=VALUE], such as reference,hqq:2,"
    "bitsandbytes:4:quant_type=fp4.  [default: every backend that can be used here]",
)
@click.option("--nbits", metavar="N[,N...]", help="Keep these widths only.")
@click.option("--axes", metavar="AXIS[,AXIS]", help="Keep these axes only: channel, token.")
@click.option("--group-size", default=64, show_default=True, help="Numbers that share a scale.")
@click.option("--tokens", default=2048, show_default=True, help="Tokens of the states.")
@click.option("--heads", default=4, show_default=True, help="Key/value heads of the states.")
@click.option("--head-dim", default=64, show_default=True, help="Channels of a head.")
@click.option("--rounds", default=3, show_default=True, help="Rounds, in each of which every method has its turn.")
@click.option("--device", default="cpu", show_default=True, help="torch device.")
@click.option("--seed", default=0, show_default=True, help="Seed of the states.")
@click.option("--markdown", is_flag=True, help="Print the table in Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def compare_backends(
    backends: str | None, nbits: str | None, axes: str | None, markdown: bool, as_json: bool, **shape: Any
) -> None:
    """Compare backends on the same states: bits per element, error, and speed.

    Errors are relative, on unit normal states and on states of which one channel in sixteen is 10 to 20 times larger,
    as in the keys of language models. Ratios are to the reference backend with the same bits and axis.
    """
    from kvquant.engine.typed import parse_widths
    from kvquant.evaluation.distortion import DistortionOptions, find_methods, measure_distortion

    methods, left_out = quietly(
        lambda: find_methods(
            backends,
            nbits=parse_widths(nbits),
            axes=None if axes is None else [axis.strip() for axis in axes.split(",")],
            group_size=shape["group_size"],
        )
    )
    options = DistortionOptions(methods=methods, **shape)
    with progress_bar("Comparing", len(methods) * (options.rounds + 1), quiet=as_json) as progress:
        report = quietly(lambda: measure_distortion(options, left_out, progress))
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    elif markdown:
        click.echo(_markdown(report))
    else:
        _show(report)


def _show(report: DistortionReport) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    out = console(pipe_width=120)
    out.print(_where(report), markup=False, soft_wrap=not out.is_terminal)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(HEADINGS):
        lines = escape(heading.replace(", ", ",\n").replace(" (", "\n(").replace("bits per ", "bits per\n"))
        table.add_column(lines, justify="left" if index in (0, 2) else "right", no_wrap=index == 0)
    previous = None
    for result in report.results:
        if previous not in (None, result.backend):
            table.add_section()
        previous = result.backend
        table.add_row(*map(escape, _cells(result)))
    out.print(table)
    out.print(_note(report), markup=False)
    for name, reason in report.left_out.items():
        out.print(f"{clean(name)} is left out: {clean(reason)}.", markup=False)


def _markdown(report: DistortionReport) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(_cells(result)) + " |" for result in report.results]
    return "\n".join([_where(report), "", *lines, "", _note(report)])


def _where(report: DistortionReport) -> str:
    libraries = (f"{name} {version}" for name, version in report.libraries.items())
    return ", ".join([machine_line(dict(report.machine)), *libraries])


def _note(report: DistortionReport) -> str:
    options = report.options
    return (
        f"Keys and values [1, {options.heads}, {options.tokens}, {options.head_dim}], groups of {options.group_size}. "
        "Bits per element count all that is held. Errors are relative. M/s are millions of numbers a second through "
        f"the cache, medians of {options.rounds} rounds; in brackets the ratio to reference in the same round."
    )


def _cells(result: Distortion) -> tuple[str, ...]:
    options = "".join(f" {name}={value}" for name, value in result.options.items())
    return (
        clean(result.backend + options),
        str(result.nbits),
        result.axis,
        f"{result.bits_per_element:.2f}",
        f"{100 * result.error_gaussian:.3g} %",
        f"{100 * result.error_outliers:.3g} %",
        _speed(result.quantise, result.quantise_ratio),
        _speed(result.dequantise, result.dequantise_ratio),
    )


def _speed(speed: Spread, ratio: Spread | None) -> str:
    return f"{speed.median / 1e6:.0f}" + (f" ({ratio.median:.2f})" if ratio else "")

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
    "bitsandbytes:4:quant_type=fp4. Ratios need reference among them.  [default: every backend that can be used here]",
)
@click.option("--nbits", metavar="N[,N...]", help="Keep these widths only.")
@click.option("--axes", metavar="AXIS[,AXIS]", help="Keep these axes only: channel, token.")
@click.option("--group-size", default=64, show_default=True, help="Numbers that share a scale.")
@click.option("--tokens", default=2048, show_default=True, help="Tokens of the states.")
@click.option("--heads", default=4, show_default=True, help="Key/value heads of the states.")
@click.option("--head-dim", default=64, show_default=True, help="Channels of a head.")
@click.option("--rounds", default=5, show_default=True, help="Rounds, in each of which every method has its turn.")
@click.option("--device", default="cpu", show_default=True, help="torch device.")
@click.option("--threads", type=click.IntRange(min=1), help="torch's threads; on a busy machine 1 scatters least.")
@click.option("--seed", default=0, show_default=True, help="Seed of the states.")
@click.option("--markdown", is_flag=True, help="Print the table in Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
@click.pass_context
def compare_backends(
    ctx: click.Context,
    /,
    backends: str | None,
    nbits: str | None,
    axes: str | None,
    markdown: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Compare backends on the same states: bits per element, error, and speed.

    Errors are relative, on unit normal states and on states of which one channel in sixteen is 10 to 20 times larger,
    as in the keys of language models. Ratios are to the reference backend with the same bits and axis. Exit code 1 if
    nothing could be measured.
    """
    from kvquant.engine.typed import parse_widths
    from kvquant.evaluation.distortion import DistortionOptions, measure_distortion
    from kvquant.evaluation.methods import find_methods

    methods, left_out = quietly(
        lambda: find_methods(
            backends,
            nbits=parse_widths(nbits),
            axes=None if axes is None else [axis.strip() for axis in axes.split(",")],
            group_size=chosen["group_size"],
            device=chosen["device"],
        )
    )
    options = DistortionOptions(methods=methods, **chosen)
    with progress_bar("Comparing", options.work) as progress:
        report = quietly(lambda: measure_distortion(options, left_out, progress))
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2, default=str))
    elif markdown:
        click.echo(_markdown(report))
    else:
        _show(report)
    if not report.results:
        ctx.exit(1)


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
    for line in (_note(report), *_left_out(report)):
        out.print(line, markup=False)


def _markdown(report: DistortionReport) -> str:
    rows = [HEADINGS, *map(_cells, report.results)]
    table = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    table.insert(1, "|" + "---|" * len(HEADINGS))
    return "\n\n".join([_where(report), "\n".join(table), _note(report), *_left_out(report)])


def _where(report: DistortionReport) -> str:
    libraries = (f"{clean(name)} {clean(version)}" for name, version in report.libraries.items())
    return ", ".join([machine_line(dict(report.machine)), *libraries])


def _note(report: DistortionReport) -> str:
    options = report.options
    return (
        f"Keys and values [1, {options.heads}, {options.tokens}, {options.head_dim}], groups of {options.group_size}. "
        "Bits per element count codes, scales, offsets and tables; where there are two, the second is for states with "
        "outlier channels. Errors are relative. M/s are millions of numbers a second through the cache, medians of "
        f"{options.rounds} rounds; in brackets the ratio to reference in the same round."
    )


def _left_out(report: DistortionReport) -> list[str]:
    return [
        f"{clean(name)} is left out: {clean(reason).removesuffix('.')}." for name, reason in report.left_out.items()
    ]


# ------------------------------------------------------------------------------------------------ cells


def _cells(result: Distortion) -> tuple[str, ...]:
    options = "".join(f" {name}={value}" for name, value in result.options.items())
    bits = [f"{quality.bits_per_element:.2f}" for quality in (result.gaussian, result.outliers)]
    return (
        clean(result.backend + options),
        str(result.nbits),
        result.axis,
        " / ".join(dict.fromkeys(bits)),
        _percent(result.gaussian.error),
        _percent(result.outliers.error),
        _speed(result.quantise, result.quantise_ratio),
        _speed(result.dequantise, result.dequantise_ratio),
    )


def _percent(share: float) -> str:
    """Return three digits, as many for 0.532 % as for 45.0 %."""
    return f"{100 * share:#.3g}".rstrip(".") + " %"


def _speed(speed: Spread, ratio: Spread | None) -> str:
    millions = speed.median / 1e6
    return f"{millions:.{0 if millions >= 10 else 1}f}" + (f" ({ratio.median:.2f})" if ratio else "")

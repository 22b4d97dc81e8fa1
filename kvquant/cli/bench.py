"""`kvquant bench`: what caches cost, side by side."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from kvquant.evaluation.bench import BenchOptions, BenchReport, CacheResult, Progress
    from kvquant.evaluation.measure import Spread

_MIB = 1 << 20


@click.command()
@click.option("--model", metavar="NAME_OR_PATH", help="Model to decode with; without it a Llama with random weights.")
@click.option("--contexts", default="4k,32k", show_default=True, help="Tokens in the cache, such as 4k,32768.")
@click.option(
    "--caches",
    default="dynamic,transformers:quanto:4,kvquant:reference:4,kvquant:reference:2",
    show_default=True,
    help="Caches to compare, each kind[:backend[:nbits]]: dynamic, transformers:quanto:4, transformers:hqq:2, "
    "kvquant:BACKEND:NBITS with any installed backend. Ratios need dynamic among them.",
)
@click.option("--steps", default=8, show_default=True, help="Decode steps timed in a round.")
@click.option("--rounds", default=3, show_default=True, help="Rounds, in each of which every cache has its turn.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="torch device.")
@click.option("--threads", type=click.IntRange(min=1), help="torch's threads; on a busy machine 1 scatters least.")
@click.option("--seed", default=0, show_default=True, help="Seed of random weights and states.")
@click.option("--layers", default=2, show_default=True, help="Layers of the random model.")
@click.option("--hidden", default=2048, show_default=True, help="Hidden size of the random model.")
@click.option("--heads", default=32, show_default=True, help="Query heads of the random model.")
@click.option("--kv-heads", default=8, show_default=True, help="Key/value heads of the random model.")
@click.option("--head-dim", default=64, show_default=True, help="Channels of a head of the random model.")
@click.option("--memory/--no-memory", default=True, show_default=True, help="Measure peak memory too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with times in seconds and memory in bytes.")
def bench(as_json: bool, **chosen: Any) -> None:
    """Time caches side by side, and measure their memory.

    Each cache is filled with random states in one go, as a prefill would do it, and then decodes real tokens through
    the model. The caches take turns in one process; peak memory is measured in a fresh process for each.
    """
    from kvquant.cli.console import progress_bar
    from kvquant.errors import ConfigError, UnknownBackendError

    try:
        options = _options(chosen)
        with progress_bar("Measuring", options.work) as progress:
            report = _run(options, progress)
    except (ConfigError, UnknownBackendError) as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _show(report)


def _options(chosen: dict[str, Any]) -> BenchOptions:
    from kvquant.evaluation.bench import BenchOptions, parse_contexts
    from kvquant.evaluation.contenders import parse_contenders
    from kvquant.evaluation.subject import SyntheticModel

    shape = {name: chosen.pop(name) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim")}
    contenders, contexts = parse_contenders(chosen.pop("caches")), parse_contexts(chosen.pop("contexts"))
    return BenchOptions(contenders=contenders, contexts=contexts, synthetic=SyntheticModel(**shape), **chosen)


def _run(options: BenchOptions, progress: Progress) -> BenchReport:
    from kvquant.evaluation.bench import bench as measure

    # Some libraries print while they load; stdout belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        return measure(options, progress)


# ------------------------------------------------------------------------------------------------ the table


def _show(report: BenchReport) -> None:
    from kvquant.cli.console import console, machine_line

    screen = console()
    model, options = report.model, report.options
    screen.print(machine_line(report.machine), markup=False)
    screen.print(
        f"{model['architecture']} ({model['name']}), {model['layers']} layers, hidden {model['hidden']}, "
        f"{model['heads']} query heads, {model['kv_heads']} key/value heads of {model['head_dim']}, {model['dtype']}, "
        f"{model['attention']} attention",
        markup=False,
    )
    for context in options.contexts:
        screen.print(_table(context, [result for result in report.results if result.context == context]))
    screen.print(
        f"Medians (lowest-highest) of {options.rounds} rounds of {options.steps} steps. The history is synthetic: fill "
        "is the cache's own work for random states of all layers, without the model's part of a prefill. A flush is a "
        "step in which tokens leave the window and are quantised; 'with flushes' is a step with its share of one. "
        "Ratios are of that to dynamic in the same round. Peak is the rise of memory in use while filling, decoding "
        "and flushing, in a fresh process.",
        markup=False,
    )


def _table(context: int, results: list[CacheResult]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{context} tokens", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", no_wrap=True)
    for heading in (
        "decode\nms/step",
        "flush\nms / every",
        "with flushes\nms/step",
        "x dynamic\n",
        "cache\nMiB",
        "peak\nMiB",
    ):
        table.add_column(heading, justify="right")
    table.add_column("fill\ns", justify="right")
    for result in results:
        if result.step is not None:
            table.add_row(
                result.cache,
                _spread(result.step, 1000, 1),
                f"{1000 * result.flush.median:.0f} / {result.flush_period}" if result.flush else "-",
                _spread(result.amortised, 1000, 1),
                _spread(result.ratio),
                _mib(result.cache_bytes),
                _mib(result.peak_bytes),
                "-" if result.fill is None else f"{result.fill.median:.2f}",
            )
    problems = [f"{result.cache}: not available, {result.problem}" for result in results if result.problem]
    table.caption, table.caption_justify = "\n".join(map(escape, problems)) or None, "left"
    return table


def _spread(spread: Spread | None, factor: float = 1, digits: int = 2) -> str:
    if spread is None:
        return "-"
    figures = [factor * value for value in (spread.median, spread.low, spread.high)]
    digits = 0 if figures[0] >= 100 else digits
    median, low, high = (format(figure, f".{digits}f") for figure in figures)
    return f"{median} ({low}-{high})"


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / _MIB:.1f}"

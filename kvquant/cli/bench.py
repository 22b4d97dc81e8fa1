"""`kvquant bench`: what caches cost, side by side."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
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
    default="dynamic,static,transformers:quanto:4,transformers:fp8,kvquant:reference:4,kvquant:reference:2",
    show_default=True,
    help="Caches to compare, each kind[:backend[:nbits]]: dynamic, static, transformers:quanto:4, transformers:hqq:2, "
    "transformers:fp8, turboquant:4, kvquant:BACKEND:NBITS with any installed backend. Behind kvquant: may stand "
    "anything that --backends of kvquant eval takes, such as kvquant:reference:2:scale=error:sink_length=4 or "
    "kvquant:smallest.",
)
@click.option(
    "--against",
    metavar="CACHE",
    help="The one of them that the speed of the others is compared with  [default: dynamic, if it is among them].",
)
@click.option(
    "--attention",
    is_flag=True,
    default=False,
    help="No model: cache and attention alone, in the shape of the random model's layers.",
)
@click.option("--batch", default=1, show_default=True, help="Sequences at once.")
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
@click.option(
    "--prefill/--no-prefill", default=False, show_default=True, help="Run a real prefill of each length too (slow)."
)
@click.option("--plot", type=click.Path(path_type=Path), help="PNG file for memory and latency against context length.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with times in seconds and memory in bytes.")
def bench(as_json: bool, plot: Path | None, **chosen: Any) -> None:
    """Time caches side by side, and measure their memory.

    Each cache is filled with random states in one go, as a prefill would do it, and then decodes real tokens through
    the model, or, with --attention, through cache and attention alone. The caches take turns in one process; peak
    memory is measured in a fresh process for each.
    """
    from kvquant.cli.console import progress_bar
    from kvquant.errors import ConfigError, UnknownBackendError
    from kvquant.evaluation.figures import bench as figure
    from kvquant.evaluation.figures import check_plot, save

    try:
        check_plot(plot)
        options = _options(chosen)
        with progress_bar("Measuring", options.work) as progress:
            report = _run(options, progress)
    except (ConfigError, UnknownBackendError) as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _show(report)
    if plot is not None:
        save(figure.draw(report), plot)
        click.echo(f"Wrote {plot}", err=True)


def _options(chosen: dict[str, Any]) -> BenchOptions:
    from kvquant.evaluation.bench import BenchOptions
    from kvquant.evaluation.contenders import parse_contenders
    from kvquant.evaluation.sizes import parse_contexts
    from kvquant.evaluation.subject import SyntheticModel

    shape = {name: chosen.pop(name) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim")}
    contenders, contexts = parse_contenders(chosen.pop("caches")), parse_contexts(chosen.pop("contexts"))
    against = _label(chosen.pop("against"))
    synthetic = SyntheticModel(**shape)
    return BenchOptions(contenders=contenders, contexts=contexts, against=against, synthetic=synthetic, **chosen)


def _label(cache: str | None) -> str | None:
    """Return the label of a cache as it is typed: kvquant:reference is kvquant:reference:4."""
    from kvquant.errors import ConfigError
    from kvquant.evaluation.contenders import Contender

    if cache is None:
        return None
    with contextlib.suppress(ConfigError):  # what is none is not among the caches, which says what is
        return Contender.parse(cache).label
    return cache


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
    hidden = f", hidden {model['hidden']}" if "hidden" in model else ""
    name = f"{model['architecture']} ({model['name']})" if model["architecture"] else model["name"]
    screen.print(
        f"{name}, {model['layers']} layers{hidden}, {model['heads']} query heads, {model['kv_heads']} key/value heads "
        f"of {model['head_dim']}, {model['dtype']}, {model['attention']} attention",
        markup=False,
    )
    screen.print(f"Memory is read at {report.bandwidth / 1e9:.1f} GB/s.", markup=False)
    if report.floor is not None:
        floor = _spread(report.floor, 1000, 1)
        screen.print(f"The model alone, over a cache of one token, takes {floor} ms a step.", markup=False)
    if options.batch > 1:
        screen.print(f"{options.batch} sequences at once.", markup=False)
    for context in options.contexts:
        results = [result for result in report.results if result.context == context]
        screen.print(_table(context, results, report.options.against))
    screen.print(_legend(report), markup=False)


def _legend(report: BenchReport) -> str:
    options = report.options
    base = "dynamic" if options.against is None else f"--against, which is {options.against}"
    parts = [
        f"Medians (lowest-highest) of {options.rounds} rounds of {options.steps} steps.",
        "The history is synthetic: fill is the cache's own work for random states of all layers, without a model.",
        "A flush is a step in which tokens leave the window and are quantised; a step has its share of one in it.",
        f"Faster than {base}: times, in the same round, below 1 where a cache is slower.",
        "'Best other' is the fastest quantised cache that is not kvquant's.",
        "Cache: held at the end of the fill.",
    ]
    if options.memory:
        parts.append("Peak: rise of memory in use while filling, decoding and flushing; temporary: while decoding and")
        parts.append("flushing alone. Both in a fresh process.")
    if options.attention:
        parts.append(
            "Attention: of a step, without the update; x limit: over reading the cache's bytes once at that rate."
        )
    if options.prefill:
        parts.append("Added: the cache's share of the prefill beyond dynamic's, over the model's own time.")
    return " ".join(parts)


def _table(context: int, results: list[CacheResult], against: str | None) -> Table:
    """Return the table of one context length; columns of which nothing was measured are left out."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{context} tokens", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", overflow="fold", min_width=24)
    rows = [result for result in results if result.step is not None]
    columns = {heading: [show(result) for result in rows] for heading, show in _COLUMNS.items()}
    if against is not None:
        columns = {_OVER_AGAINST if heading == _OVER_FULL else heading: cells for heading, cells in columns.items()}
    used = {heading: cells for heading, cells in columns.items() if any(cell != "-" for cell in cells)}
    for heading in used:
        table.add_column(heading, justify="right", no_wrap=True)
    for row, result in enumerate(rows):
        table.add_row(escape(result.cache), *(cells[row] for cells in used.values()))
    notes = [f"{result.cache}: not available, {result.problem}" for result in results if result.problem]
    kernels = {result.kernel for result in rows if result.kernel}
    notes += [f"attention over quantised tokens by {kernel}" for kernel in sorted(kernels)]
    table.caption, table.caption_justify = "\n".join(map(escape, notes)) or None, "left"
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


def _flush(result: CacheResult) -> str:
    return f"{1000 * result.flush.median:.0f} / {result.flush_period}" if result.flush else "-"


#: Heading of the ratio of speeds, and where it is to the cache that was named.
_OVER_FULL, _OVER_AGAINST = "faster than\ndynamic", "faster than\n--against"

#: Heading -> what stands in the column for a result.
_COLUMNS: dict[str, Callable[[CacheResult], str]] = {
    "step\nms": lambda result: _spread(result.amortised, 1000, 1),
    "flush\nms / every": _flush,
    _OVER_FULL: lambda result: _spread(result.speedup),
    "faster than\nbest other": lambda result: _spread(result.speedup_quantised),
    "attention\nms": lambda result: "-" if result.attention is None else f"{1000 * result.attention.median:.2f}",
    "x limit\n": lambda result: "-" if result.over_limit is None else f"{result.over_limit:.1f}",
    "cache\nMiB": lambda result: _mib(result.cache_bytes),
    "peak\nMiB": lambda result: _mib(result.peak_bytes),
    "temporary\nMiB": lambda result: _mib(result.step_bytes),
    "fill\ns": lambda result: "-" if result.fill is None else f"{result.fill.median:.2f}",
    "prefill\ns": lambda result: _spread(result.prefill, 1, 1),
    "added\n%": lambda result: _spread(result.prefill_added, 100, 2),
}

"""`kvquant plan`: what a model and its cache will take, and what fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvquant.cli.eval_options import SHARED, results_only, setting_options
from kvquant.cli.eval_run import deliver

if TYPE_CHECKING:
    from rich.table import Table

    from kvquant.evaluation.plan import PlanOptions, PlanReport, PlanRow


@click.command()
@click.option(
    "--model", metavar="NAME_OR_CONFIG", help="Name or folder of a model, or a config.json file [default: shipped]."
)
@click.option("--context", help="Tokens in the cache, such as 128k [default: the model's positions].")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once.")
@click.option(
    "--backend",
    "--backends",
    "backends",
    metavar="LIST",
    default="reference",
    show_default=True,
    help="Caches to plan, separated by commas: BACKEND[:NBITS...][:AXIS][:OPTION=VALUE...] or a preset, such as "
    "hqq,reference:4:2:nbits_key=8,kivi-2. A backend without bits stands for all whole widths that it has.",
)
@click.option("--nbits", metavar="N[,N...]", help="Show the parts of these widths; without it, of all.")
@click.option("--memory", metavar="SIZE", help="Memory that there is, such as 24GB or 22.5GiB: say what fits in it.")
@click.option(
    "--overhead", metavar="SIZE", help="Memory that other things take, such as 2GB: activations are not counted."
)
@click.option("--weights", metavar="SIZE", help="What the weights take [default: counted from the config].")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "float64"]),
    default="auto",
    show_default=True,
    help="Type of weights and states; auto takes the config's, or bfloat16 where it says none.",
)
@click.option(
    "--decode",
    type=int,
    help="Tokens of the context that come one at a time, after a prefill of the others [default: 256].",
)
@setting_options
@click.option("--device", default="cpu", show_default=True, help="Where backends quantise a little data to show how.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw the result.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead, with sizes in bytes.")
def plan(as_json: bool, plot: Path | None, nbits: str | None, **chosen: Any) -> None:
    """Say what a cache will take, and what fits, from a model's config alone.

    Nothing is loaded: neither weights nor a tokenizer. Weights are counted, and the cache is worked out part by part
    as it would report itself, for full precision and for every width of the backends. With --memory the table says
    how long a context fits beside the weights.
    """
    from kvquant.evaluation.figures import check_plot
    from kvquant.evaluation.figures import plan as figure
    from kvquant.evaluation.measure import describe_machine
    from kvquant.evaluation.plan import make_plan
    from kvquant.evaluation.planning.model import model_shape
    from kvquant.evaluation.sizes import parse_bytes

    check_plot(plot)
    name, dtype, weights = _name(chosen.pop("model")), chosen.pop("dtype"), chosen.pop("weights")
    with results_only():
        options, detailed = _options(nbits, chosen)
        given = None if weights is None else parse_bytes("weights", weights)
        shape = model_shape(name, dtype=dtype, batch=options.batch, weights=given)
        report = make_plan(shape, options)
        machine = describe_machine(options.device)
    deliver(
        report,
        machine,
        _title(report),
        draw=figure.draw,
        show=lambda: _show(report, detailed),
        plot=plot,
        as_json=as_json,
    )


def _name(name: str | None) -> str:
    from kvquant.demo import MODEL_DIR

    return str(MODEL_DIR) if name is None else name


def _options(nbits: str | None, chosen: dict[str, Any]) -> tuple[PlanOptions, list[str]]:
    """Return what to plan, and the labels of the caches whose parts are wanted."""
    from kvquant.engine.typed import parse_widths
    from kvquant.evaluation.plan import PlanOptions, planned_candidates
    from kvquant.evaluation.sizes import parse_bytes, parse_tokens

    backends, shared = chosen.pop("backends"), {name: chosen.pop(name) for name in SHARED}
    candidates = planned_candidates(backends, shared=shared)
    detailed = planned_candidates(backends, parse_widths(nbits), shared) if nbits else candidates
    sizes = {name: chosen.pop(name) for name in ("memory", "overhead")}
    chosen.update({name: parse_bytes(name, text) for name, text in sizes.items() if text is not None})
    context = chosen.pop("context")
    if context is not None:
        chosen["context"] = parse_tokens("context", context)
    labels = [candidate.label for candidate in detailed]
    return PlanOptions(candidates=candidates, **chosen), labels


def _title(report: PlanReport) -> str:
    from kvquant.demo import MODEL_DIR

    name = report.settings["model"]["name"]
    return "the shipped model" if name == str(MODEL_DIR) else str(name)


# ------------------------------------------------------------------------------------------------ the tables


def _show(report: PlanReport, detailed: list[str]) -> None:
    from kvquant.cli.console import console

    out = console()
    for line in _heading(report):
        out.print(line, markup=False)
    out.print(_widths(report, detailed))
    out.print(_parts([row for row in report.rows if row.cache in detailed]))
    for line in _notes(report, detailed):
        out.print(line, style="dim", markup=False)


def _heading(report: PlanReport) -> list[str]:
    from kvquant.engine.memory import format_bytes

    settings = report.settings
    model, weights = settings["model"], settings["weights"]
    at_once, one_by_one = settings["context"] - settings["decode"], settings["decode"]
    sequences = "1 sequence" if settings["batch"] == 1 else f"{settings['batch']} sequences"
    how = f"{at_once:,} at once and {one_by_one:,} one at a time"
    return [
        f"{_title(report)}: {model['architecture']}, {model['layers']} layers, states in {model['dtype']}",
        f"weights: {format_bytes(weights['nbytes'])}, {weights['parameters']:,} parameters, {weights['how']}",
        f"cache: {sequences} of {settings['context']:,} tokens, {how}",
    ]


def _widths(report: PlanReport, detailed: list[str]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from kvquant.engine.memory import format_bytes

    memory = report.settings["memory"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", overflow="fold", min_width=16)
    headings = ["bits per\nelement", "cache\n", "times\nsmaller", "with\nweights"]
    if memory is not None:
        headings += [f"left of\n{format_bytes(memory)}", "longest context\nthat fits"]
    for heading in headings:
        table.add_column(heading, justify="right")
    chosen = len(detailed) < len(report.rows)
    for row in report.rows:
        style = "bold" if chosen and row.cache in detailed[1:] else ""
        table.add_row(escape(row.cache), *_figures(row, fits=memory is not None), style=style)
    return table


def _figures(row: PlanRow, *, fits: bool) -> list[str]:
    from kvquant.engine.memory import format_bytes

    bits = "-" if row.bits_per_element is None else f"{row.bits_per_element:.2f}"
    cells = [bits, format_bytes(row.nbytes), f"{row.smaller:.2f}", format_bytes(row.total)]
    if fits and row.left is not None:
        cells += [format_bytes(row.left), "any" if row.longest is None else f"{row.longest:,}"]
    return cells


def _parts(rows: list[PlanRow]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from kvquant.engine.memory import PARTS, format_bytes

    table = Table(title="What the cache is made of", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cache", overflow="fold", min_width=16)
    used = [part for part in PARTS if any(row.parts[part] for row in rows)]
    for heading in [*used, "total"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        sizes = [format_bytes(row.parts[part]) if row.parts[part] else "-" for part in used]
        table.add_row(escape(row.cache), *sizes, format_bytes(row.nbytes))
    return table


def _notes(report: PlanReport, detailed: list[str]) -> list[str]:
    from kvquant.engine.memory import format_bytes

    settings = report.settings
    weights, positions, memory = settings["weights"]["nbytes"], settings["model"]["positions"], settings["memory"]
    notes = []
    if memory is not None and weights + settings["overhead"] > memory:
        beside = " and the overhead" if settings["overhead"] else ""
        over = weights + settings["overhead"] - memory
        notes.append(f"The weights{beside} alone take {format_bytes(over)} more than there is: nothing fits.")
    if positions is not None and settings["context"] > positions:
        notes.append(f"The model has {positions:,} positions, and the context is longer: that needs them extended.")
    elif positions is not None and any((row.longest or 0) > positions for row in report.rows):
        notes.append(f"The model has {positions:,} positions: what is longer and fits needs them extended.")
    wider = [(row.cache, row.most_nbytes / row.nbytes - 1) for row in report.rows if row.cache in detailed]
    if any(share for _, share in wider):
        most = ", ".join(f"{label} {share:.1%}" for label, share in wider if share)
        counted = "Scales are counted in 8 or 16 bits: as scale_bits says, or else in 8 below 4 bits."
        notes.append(f"{counted} Where states need them in float32, at most so much more: {most}.")
    notes.append(
        f"Beside weights and cache {format_bytes(settings['overhead'])} are counted, as --overhead says."
        if settings["overhead"]
        else "Activations, and what a prefill takes for a moment, are not counted: --overhead SIZE makes room for them."
    )
    return notes

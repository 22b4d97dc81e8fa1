"""`kvquant support modes`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from kvquant.cli.eval_options import bits

if TYPE_CHECKING:
    from kvquant.evaluation.support.runs import Mode, ModeResult

#: Columns of the table, in the terminal and in Markdown.
HEADINGS = ("mode", "as DynamicCache", "tokens quantised", "attention", "note")


@click.command("modes")
@click.option("--backend", default="reference", show_default=True, help="Backend of the cache.")
@click.option("--nbits", type=bits, metavar="N", default=4, show_default=True, help="Bits of a code.")
@click.option("--mode", "chosen", multiple=True, metavar="NAME", help="Run this one only; may be given several times.")
@click.option("--markdown", is_flag=True, help="Print the table in Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
@click.pass_context
def modes(
    ctx: click.Context, /, backend: str, nbits: float, chosen: tuple[str, ...], markdown: bool, as_json: bool
) -> None:
    """Run every way of generating on tiny models, with a DynamicCache and with a quantised one.

    Each runs three times: with a DynamicCache, with nothing quantised yet, which must give the same, and with most
    tokens quantised. What transformers itself does not have has its reason in the table. Exit code 1 if something that
    works with a DynamicCache does not with ours.
    """
    from kvquant.cli.console import progress_bar
    from kvquant.cli.eval_options import results_only
    from kvquant.engine.config import CacheConfig
    from kvquant.engine.settings import layer_settings
    from kvquant.evaluation.advice import without_advice
    from kvquant.evaluation.support.runs import run_modes

    options = {"backend": backend, "nbits": nbits}
    layer_settings(CacheConfig.from_dict(options))  # what cannot work is said once, and not by every mode
    wanted = _chosen(chosen)
    results = []
    with progress_bar("Running", len(wanted), quiet=as_json) as progress, results_only(), without_advice():
        for result in run_modes(wanted, options):
            results.append(result)
            progress(1)
    if as_json:
        told = {"options": options, "versions": _versions(), "modes": [result.to_dict() for result in results]}
        click.echo(json.dumps(told, indent=2))
    elif markdown:
        click.echo(_markdown(options, results))
    else:
        _show(options, results)
    if not all(result.works for result in results):
        ctx.exit(1)


def _chosen(names: Iterable[str]) -> list[Mode]:
    """Return the modes of these names, or all.

    Raises:
        UnknownOptionError: there is none of a name.
    """
    from kvquant.errors import UnknownOptionError
    from kvquant.evaluation.support.modes import MODES
    from kvquant.integrations.modes import INTEGRATION_MODES

    known = {mode.name: mode for mode in (*MODES, *INTEGRATION_MODES)}
    for name in names:
        if name not in known:
            raise UnknownOptionError("mode", name, known)
    return [known[name] for name in names] or list(known.values())


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for distribution in ("kvquant", "torch", "transformers", "kvpress"):
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    return found


def _where(options: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    return f"{options['backend']}, {options['nbits']} bits; {versions}"


def _show(options: dict[str, Any], results: list[ModeResult]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from kvquant.cli.console import console

    out = console()
    out.print(_where(options), markup=False, soft_wrap=not out.is_terminal)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if index == 2 else "left", no_wrap=index < 4)
    for result in results:
        table.add_row(*map(escape, _cells(result)))
    out.print(table)


def _markdown(options: dict[str, Any], results: list[ModeResult]) -> str:
    rows = [HEADINGS, *map(_cells, results)]
    table = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    table.insert(1, "|" + "---|" * len(HEADINGS))
    return f"{_where(options)}\n\n" + "\n".join(table)


def _cells(result: ModeResult) -> tuple[str, ...]:
    if result.missing:
        return result.mode, "", "", "", f"cannot be run; {result.missing}"
    if result.error:
        return result.mode, "", "", "", f"FAILS: {result.error}"
    ways = {"fused": result.fused, "dequantised": result.dequantized}
    return (
        result.mode,
        "same" if result.equal else "DIFFERS",
        f"{result.quantized} of {result.tokens}",
        " and ".join(way for way, count in ways.items() if count),
        result.note,
    )

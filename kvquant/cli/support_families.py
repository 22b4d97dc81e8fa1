"""`kvquant support families`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from kvquant.cli.eval_options import bits

if TYPE_CHECKING:
    from kvquant.evaluation.support.check import Checked
    from kvquant.evaluation.support.families import Family


@click.command("families")
@click.option("--only", multiple=True, metavar="NAME", help="Run this family only; may be given several times.")
@click.option("--backend", default="reference", show_default=True, help="Backend of the cache.")
@click.option("--nbits", type=bits, metavar="N", default=8, show_default=True, help="Bits of a code.")
@click.option("--markdown", is_flag=True, help="Print the table in Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
@click.pass_context
def families(
    ctx: click.Context, /, only: tuple[str, ...], backend: str, nbits: float, markdown: bool, as_json: bool
) -> None:
    """Run a tiny model of every family, with a DynamicCache and with a quantised one.

    Each generates three times, two rows at once, one of them padded: with a DynamicCache; with a quantised cache while
    nothing is quantised, which must give the same tokens and the same logits; and with most tokens quantised, which
    must give nearly the same logits. Exit code 1 if one does not.
    """
    from kvquant.cli.console import progress_bar
    from kvquant.cli.eval_options import results_only
    from kvquant.engine.config import CacheConfig
    from kvquant.engine.settings import layer_settings
    from kvquant.evaluation.support.check import check_family, for_tiny_models, small_options

    layer_settings(CacheConfig.from_dict(small_options(backend, nbits)))  # said once, and not of every family
    wanted = _chosen(only)
    results = []
    with progress_bar("Running", len(wanted), quiet=as_json) as progress, results_only(), for_tiny_models():
        for family in wanted:
            results.append(check_family(family, backend, nbits))
            progress(1)
    if as_json:
        options = {"backend": backend, "nbits": nbits}
        told = [{**one.to_dict(), "problems": one.problems(nbits)} for one in results]
        click.echo(json.dumps({"options": options, "versions": _versions(), "families": told}, indent=2))
    else:
        _show(results, backend, nbits, markdown=markdown)
    if any(one.problems(nbits) for one in results):
        ctx.exit(1)


def _chosen(names: tuple[str, ...]) -> list[Family]:
    """Return the families of these names, or all.

    Raises:
        UnknownOptionError: there is none of a name.
    """
    from kvquant.errors import UnknownOptionError
    from kvquant.evaluation.support.families import FAMILIES

    known = {family.name.lower(): family for family in FAMILIES}
    for name in names:
        if name.lower() not in known:
            raise UnknownOptionError("family name", name, [family.name for family in FAMILIES])
    return [known[name.lower()] for name in names] or list(FAMILIES)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("kvquant", "torch", "transformers")}


def _show(results: list[Checked], backend: str, nbits: float, *, markdown: bool) -> None:
    from kvquant.evaluation.support import table

    rows = [table.cells(one, nbits) for one in results]
    where = f"{backend}, {nbits} bits; {', '.join(f'{name} {version}' for name, version in _versions().items())}"
    if markdown:
        click.echo(f"{where}\n\n{table.markdown(rows)}\n\n{table.summary(results, nbits)}.")
        return
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from kvquant.cli.console import console

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in table.HEADINGS:
        shown.add_column(heading, overflow="fold", justify="right" if heading == "logits off by" else "left")
    for row, one in zip(rows, results, strict=True):
        shown.add_row(*map(escape, row), style="red" if one.problems(nbits) else "")
    out = console()
    out.print(where)
    out.print(shown)
    out.print(f"{table.summary(results, nbits)}.")

"""``kvquant list-backends``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import click

from kvquant import registry
from kvquant.cli.console import console
from kvquant.cli.describe import STYLES, clean, facts, quietly, status_word
from kvquant.registry import Backend

_HEADINGS = ("name", "version", "distribution", "available", "bits", "axes", "formats")


@click.command("list-backends")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def list_backends(as_json: bool) -> None:
    """List the backends that are installed, and say of each whether it can be used, and if not why."""
    backends = quietly(registry.list_backends)
    if as_json:
        click.echo(json.dumps([facts(backend) for backend in backends], indent=2))
        return
    if not backends:
        click.echo("No backends are installed.", err=True)
        return
    from rich.table import Table

    out = console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in _HEADINGS:
        table.add_column(heading, no_wrap=heading == "name", overflow="fold")
    for backend in backends:
        table.add_row(*_cells(backend), style="" if backend.availability.ok else STYLES[backend.availability.status])
    out.print(table, markup=False)
    for backend in backends:
        state = backend.availability
        if not state.ok:
            reason = f"{clean(backend.name)}: {clean(state.reason)}. Next step: {clean(state.hint)}"
            out.print(reason, markup=False, soft_wrap=not out.is_terminal)


def _cells(backend: Backend) -> tuple[str, ...]:
    origin = clean(backend.name), clean(backend.version) or "-", clean(backend.distribution), status_word(backend)
    if backend.spec is None:
        return (*origin, "-", "-", "-")
    can = backend.capabilities
    return (*origin, _ranges(can.nbits), ", ".join(can.axes), ", ".join(can.formats))


def _ranges(numbers: Sequence[int]) -> str:
    """Return ``"1-4, 8"`` for 1, 2, 3, 4, 8."""
    runs: list[list[int]] = [[]]
    ordered = sorted(set(numbers))
    for number, following in pairwise([*ordered, ordered[-1] + 2]):
        runs[-1].append(number)
        if following != number + 1:
            runs.append([])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs if run)

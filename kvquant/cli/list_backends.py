"""``kvquant list-backends``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import click

from kvquant import registry
from kvquant.cli.describe import facts, print_found, quietly
from kvquant.errors import listing
from kvquant.registry import Backend


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
    print_found(backends, ("bits", "axes", "formats"), _cells)


def _cells(backend: Backend) -> tuple[str, ...]:
    if backend.spec is None:
        return ("-", "-", "-")
    can = backend.capabilities
    return (_ranges(can.nbits), listing(can.axes), listing(can.formats))


def _ranges(numbers: Sequence[int]) -> str:
    """Return ``"1-4, 8"`` for 1, 2, 3, 4, 8."""
    runs: list[list[int]] = [[]]
    ordered = sorted(set(numbers))
    for number, following in pairwise([*ordered, ordered[-1] + 2]):
        runs[-1].append(number)
        if following != number + 1:
            runs.append([])
    return listing(f"{run[0]}-{run[-1]}" if len(run) > 2 else listing(run) for run in runs if run)

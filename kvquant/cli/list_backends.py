"""``kvquant list-backends``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kvquant.registry import Backend


@click.command("list-backends")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def list_backends(as_json: bool) -> None:
    """List the backends that are installed, and say of each whether it can be used, and if not why."""
    from kvquant import registry

    backends = registry.list_backends()
    if as_json:
        click.echo(json.dumps([describe(backend) for backend in backends], indent=2))
        return
    from rich.table import Table

    from kvquant.cli.console import console

    table = Table()
    for column in ("name", "version", "distribution", "available", "bits", "axes", "formats"):
        table.add_column(column, overflow="fold")
    for backend in backends:
        row = describe(backend)
        style = "" if backend.availability.ok else "dim"
        columns = (row["name"], row["version"], row["distribution"], str(backend.availability))
        table.add_row(*columns, *(", ".join(map(str, row[name])) for name in ("nbits", "axes", "formats")), style=style)
    console().print(table, markup=False)


def describe(backend: Backend) -> dict[str, Any]:
    """Return what a listing says of a backend, as plain builtins."""
    state, spec = backend.availability, backend.spec
    capabilities = None if spec is None else spec.capabilities
    return {
        "name": backend.name,
        "version": backend.version,
        "distribution": backend.distribution,
        "status": state.status,
        "reason": state.reason,
        "hint": state.hint,
        "nbits": [] if capabilities is None else list(capabilities.nbits),
        "axes": [] if capabilities is None else list(capabilities.axes),
        "formats": [] if capabilities is None else list(capabilities.formats),
    }

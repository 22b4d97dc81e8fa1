"""``kvquant info NAME``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from kvquant.cli.list_backends import describe

if TYPE_CHECKING:
    from kvquant.registry import Backend


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def info(name: str, as_json: bool) -> None:
    """Show everything about the backend NAME: what it can do, and whether it can be used here."""
    from kvquant.errors import BackendUnavailableError
    from kvquant.registry import get_backend, list_backends

    try:
        backend = get_backend(name)
    except BackendUnavailableError as error:
        # A backend that cannot be used is still worth looking at.
        backend = next(one for one in list_backends() if one.name == error.name)
    facts = everything(backend)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    from rich.table import Table

    from kvquant.cli.console import console

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for fact, value in facts.items():
        table.add_row(fact.replace("_", " "), _text(value))
    console().print(table, markup=False)


def everything(backend: Backend) -> dict[str, Any]:
    """Return all that is known of a backend, as plain builtins."""
    facts = describe(backend)
    spec = backend.spec
    if spec is None:
        return facts
    capabilities = spec.capabilities
    return {
        **facts,
        "group_sizes": None if capabilities.group_sizes is None else list(capabilities.group_sizes),
        "integer_axes": {str(number): axis for number, axis in capabilities.axis_aliases.items()},
        "devices": list(capabilities.devices),
        "dtypes": list(capabilities.dtypes),
        "deterministic": capabilities.deterministic,
        "options": dict(capabilities.options),
        "requires": [
            requirement.distribution + (f" >= {requirement.minimum}" if requirement.minimum else "")
            for requirement in spec.requires
        ],
        "summary": spec.summary,
        "url": spec.url,
    }


def _text(value: object) -> str:
    if value is None:
        return "any"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {meaning}" for key, meaning in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value) or "-"

"""``kvquant list-transforms``."""

from __future__ import annotations

import json

import click

from kvquant import registry
from kvquant.cli.describe import clean, print_found, quietly, transform_facts
from kvquant.registry import TransformPlugin


@click.command("list-transforms")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def list_transforms(as_json: bool) -> None:
    """List the transforms that are installed, for rotation_key and rotation_value, and whether each can be used."""
    transforms = quietly(registry.list_transforms)
    if as_json:
        click.echo(json.dumps([transform_facts(transform) for transform in transforms], indent=2))
        return
    if not transforms:
        click.echo("No transforms are installed.", err=True)
        return
    print_found(transforms, ("summary",), _cells)


def _cells(transform: TransformPlugin) -> tuple[str, ...]:
    return (clean(transform.spec.summary) or "-" if transform.spec else "-",)

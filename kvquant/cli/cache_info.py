"""`kvquant cache info FILE`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import click

from kvquant.cli.describe import clean


@click.command("info")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def info(file: Path, as_json: bool) -> None:
    """Show what the saved cache FILE is: its tokens, layers, options, model and versions.

    Only the header is read, so the answer is quick however long the cache; kvquant cache verify reads it all.
    """
    from kvquant.cache.describe import describe
    from kvquant.cache.header import read_header

    facts = describe(read_header(file))
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)


def _show(facts: dict[str, Any]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from kvquant.cli.console import console

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(facts):
        table.add_row(name, escape(clean(text)))
    out = console(pipe_width=120)
    out.print(table)
    for title, part in (("layers", facts["layers"]), ("encoder's states", facts["cross"])):
        if not part:
            continue
        layers = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in (title, "kind", "tokens", "quantised", "bytes"):
            layers.add_column(heading, justify="left" if heading == "kind" else "right")
        for first, last, layer in _runs(part):
            numbers = f"{first}" if first == last else f"{first}-{last}"
            layers.add_row(
                numbers,
                escape(clean(layer["kind"])),
                *(f"{layer[key]}" for key in ("tokens", "quantized_tokens", "nbytes")),
            )
        out.print(layers)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from kvquant.engine.memory import format_bytes

    model, ids, versions = facts["model"], facts["token_ids"], facts["versions"]
    chosen = {name: value for name, value in facts["config"].items() if value not in (None, {}, [])}
    backends = versions.get("backends")
    brought = [f"{name} of {_origin(one)}" for name, one in backends.items()] if isinstance(backends, dict) else []
    return [
        ("file", f"{facts['path']}, {format_bytes(facts['nbytes'])}, format {facts['format_version']}"),
        ("tokens", f"{facts['tokens']}, of which {facts['quantized_tokens']} are quantised"),
        ("token ids", "not kept" if ids is None else f"{' x '.join(map(str, ids))}"),
        (
            "model",
            "not known"
            if model is None
            else f"{model.get('architecture')}, {model.get('dtype')}, weights {model.get('weights')}",
        ),
        ("options", ", ".join(f"{name}={value}" for name, value in chosen.items())),
        (
            "saved by",
            ", ".join(f"{name} {versions[name]}" for name in ("kvquant", "torch", "transformers") if name in versions),
        ),
        ("backends", ", ".join(brought) or "none"),
    ]


def _origin(backend: object) -> str:
    return f"{backend.get('distribution')} {backend.get('version')}" if isinstance(backend, dict) else "unknown"


def _runs(layers: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """Return ``(first, last, layer)`` for each run of layers that differ in their number alone."""
    runs = []
    for _, same in itertools.groupby(layers, lambda layer: [value for key, value in layer.items() if key != "layer"]):
        run = list(same)
        runs.append((run[0]["layer"], run[-1]["layer"], run[0]))
    return runs

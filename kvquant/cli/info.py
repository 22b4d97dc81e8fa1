"""``kvquant info NAME``."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable

import click

from kvquant import registry
from kvquant.attention.kernels import describe
from kvquant.cli.describe import clean, facts, quietly, status_word
from kvquant.errors import origin
from kvquant.plugin.spec import BackendSpec, Requirement
from kvquant.registry.availability import installed_version, requirement_text


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def info(name: str, as_json: bool) -> None:
    """Show everything about the backend NAME: what it can do, and whether it can be used here.

    Where several distributions have a backend of one name, NAME is "distribution:name".
    """
    backend = quietly(lambda: registry.find_backend(name))
    if as_json:
        click.echo(json.dumps(facts(backend), indent=2))
        return
    state = backend.availability
    rows = [("available", status_word(backend))]
    rows += [("reason", clean(state.reason))] if state.reason else []
    rows += [("next step", clean(state.hint))] if state.hint else []
    rows.append(("distribution", clean(origin(backend.distribution, backend.version))))
    rows += _spec_rows(backend.spec) if backend.spec else []
    page = click.HelpFormatter(width=shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000)
    summary = backend.spec.summary if backend.spec else ""
    page.write_heading(clean(backend.name) + (f", {clean(summary)}" if summary else ""))
    page.indent()
    page.write_dl(rows)
    click.echo(page.getvalue().rstrip())


def _spec_rows(spec: BackendSpec) -> list[tuple[str, str]]:
    can = spec.capabilities
    rows = [("url", clean(spec.url))] if spec.url else []
    return [
        *rows,
        ("requires", _items(map(_requirement, spec.requires), none="nothing")),
        ("bits", _items(can.nbits)),
        ("axes", _items(can.axes)),
        ("integer axes", _items(f"{number} = {axis}" for number, axis in can.axis_aliases.items())),
        ("group sizes", _items(can.group_sizes) if can.group_sizes else "any"),
        ("devices", _items(can.devices)),
        ("dtypes", _items(can.dtypes)),
        ("formats", _items(can.formats)),
        ("attention", _attention(can.formats)),
        ("deterministic", "yes" if can.deterministic else "no"),
        ("options", _items((f"{option}: {explanation}" for option, explanation in can.options.items()))),
    ]


def _attention(formats: tuple[str, ...]) -> str:
    if "opaque" in formats:
        return "torch, each block read by the backend"
    return f"{describe()} on the CPU; torch elsewhere"


def _items(values: Iterable[object], none: str = "none") -> str:
    return ", ".join(map(clean, values)) or none


def _requirement(requirement: Requirement) -> str:
    installed = installed_version(requirement.distribution)
    state = "not installed" if installed is None else f"{installed or 'an unknown version'} is installed"
    return f"{requirement_text(requirement)} ({state})"

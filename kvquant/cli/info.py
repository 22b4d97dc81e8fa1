"""``kvquant info NAME``."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable

import click

from kvquant import registry
from kvquant.attention.kernels import describe
from kvquant.cli.describe import clean, facts, kind_of, kind_option, quietly, status_word, transform_facts
from kvquant.errors import listing, origin
from kvquant.plugin.spec import BackendSpec, Requirement
from kvquant.registry import Backend, TransformPlugin
from kvquant.registry.availability import installed_version, requirement_text


@click.command()
@click.argument("name")
@kind_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def info(name: str, kind: str | None, as_json: bool) -> None:
    """Show everything about the backend or transform NAME: what it can do, and whether it can be used here.

    Where several distributions have one of that name, NAME is "distribution:name".
    """
    found = quietly(lambda: _find(name, kind or kind_of(name)))
    if as_json:
        click.echo(json.dumps(facts(found) if isinstance(found, Backend) else transform_facts(found), indent=2))
        return
    state = found.availability
    rows = [("available", status_word(found))]
    rows += [("reason", clean(state.reason))] if state.reason else []
    rows += [("next step", clean(state.hint))] if state.hint else []
    rows.append(("distribution", clean(origin(found.distribution, found.version))))
    rows += [("url", clean(found.spec.url))] if found.spec and found.spec.url else []
    if isinstance(found, Backend):
        rows += _spec_rows(found.spec) if found.spec else []
    else:
        rows.append(("used by", "rotation_key, rotation_value"))
    page = click.HelpFormatter(width=shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000)
    summary = found.spec.summary if found.spec else ""
    page.write_heading(clean(found.name) + (f", {clean(summary)}" if summary else ""))
    page.indent()
    page.write_dl(rows)
    click.echo(page.getvalue().rstrip())


def _find(name: str, kind: str) -> Backend | TransformPlugin:
    return registry.find_backend(name) if kind == "backend" else registry.find_transform(name)


def _spec_rows(spec: BackendSpec) -> list[tuple[str, str]]:
    can = spec.capabilities
    return [
        ("requires", _items(map(_requirement, spec.requires)) if spec.requires else "nothing"),
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


def _items(values: Iterable[object]) -> str:
    return listing(map(clean, values))


def _requirement(requirement: Requirement) -> str:
    installed = installed_version(requirement.distribution)
    state = "not installed" if installed is None else f"{installed or 'an unknown version'} is installed"
    return f"{requirement_text(requirement)} ({state})"

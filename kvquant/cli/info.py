"""``kvquant info NAME``."""

from __future__ import annotations

import json
from collections.abc import Iterable

import click

from kvquant import registry
from kvquant.cli.columns import paragraph, terminal_width
from kvquant.cli.describe import clean, coloured, facts, quietly, status_word
from kvquant.errors import origin
from kvquant.plugin.spec import BackendSpec, Requirement
from kvquant.registry.availability import installed_version, requirement_text

_INDENT = 16


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
    click.echo(click.style(clean(backend.name), bold=True))
    if backend.spec and backend.spec.summary:
        click.echo("\n".join(paragraph(clean(backend.spec.summary), terminal_width(), "")))
    click.echo()
    state = backend.availability
    _show("available", coloured(status_word(backend), state.status))
    _show("reason", clean(state.reason) if state.reason else None)
    _show("next step", clean(state.hint) if state.hint else None)
    _show("distribution", clean(origin(backend.distribution, backend.version)))
    if backend.spec:
        _show_spec(backend.spec)


def _show_spec(spec: BackendSpec) -> None:
    can = spec.capabilities
    _show("url", clean(spec.url) if spec.url else None)
    _show("requires", _items(map(_requirement, spec.requires), none="nothing"))
    _show("bits", _items(can.nbits))
    _show("axes", _items(can.axes))
    _show("integer axes", _items((f"{number} = {axis}" for number, axis in can.axis_aliases.items())))
    _show("group sizes", _items(can.group_sizes) if can.group_sizes else "any")
    _show("devices", _items(can.devices))
    _show("dtypes", _items(can.dtypes))
    _show("formats", _items(can.formats))
    _show("deterministic", "yes" if can.deterministic else "no")
    _show("options", None if can.options else "none")
    for option, explanation in can.options.items():
        _show("options" if option == next(iter(can.options)) else "", f"{clean(option)}: {clean(explanation)}")


def _show(label: str, text: str | None) -> None:
    """Print one labelled line, wrapped on a terminal; nothing for None."""
    if text is not None:
        first, *others = paragraph(text, terminal_width(), " " * _INDENT)
        click.echo("\n".join([label.ljust(_INDENT) + first[_INDENT:], *others]))


def _items(values: Iterable[object], none: str = "none") -> str:
    return ", ".join(map(clean, values)) or none


def _requirement(requirement: Requirement) -> str:
    installed = installed_version(requirement.distribution)
    state = "not installed" if installed is None else f"{installed or 'an unknown version'} is installed"
    return f"{requirement_text(requirement)} ({state})"

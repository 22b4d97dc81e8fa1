"""Backends and transforms in plain builtins: what ``--json`` prints, and what the tables are made from."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import click

from kvquant import registry
from kvquant.cli.console import console
from kvquant.errors import UnknownBackendError, UnknownTransformError
from kvquant.plugin.spec import Requirement
from kvquant.registry import Backend, TransformPlugin
from kvquant.registry.availability import installed_version
from kvquant.registry.found import Found
from kvquant.registry.guard import one_line
from kvquant.registry.kinds import BACKEND, TRANSFORM, S, Spec

T = TypeVar("T")
F = TypeVar("F", bound=Found[Any])
Facts = dict[str, object]

#: The option of commands that take the name of a plugin of either kind; see `kind_of`.
kind_option = click.option(
    "--kind",
    type=click.Choice([BACKEND.name, TRANSFORM.name]),
    help="Which of the two, where both have that name.  [default: the backend, where there is one]",
)

#: How a table shows what cannot be used.
STYLES = {"missing": "yellow", "blocked": "yellow", "incompatible": "red", "broken": "red", "duplicate": "red"}


def quietly(look_up: Callable[[], T]) -> T:
    """Call `look_up` with whatever plugins print while they load on standard error; standard output is the result's."""
    with contextlib.redirect_stdout(sys.stderr):
        return look_up()


def kind_of(name: str) -> Literal["backend", "transform"]:
    """Return the kind of the plugin of that name: "backend" where both kinds have it, or none; imports no plugin."""
    try:
        registry.check_backend_name(name)
    except UnknownBackendError:
        with contextlib.suppress(UnknownTransformError):
            registry.check_transform_name(name)
            return "transform"
    return "backend"


def facts(backend: Backend) -> Facts:
    """Return all that is known of a backend; null where nothing is, as of a broken one's capabilities."""
    spec = backend.spec
    capabilities = spec.capabilities if spec else None
    known = _found_facts(backend, BACKEND.name)
    known["requires"] = [_requirement(requirement) for requirement in spec.requires] if spec else None
    sequences = ("nbits", "axes", "group_sizes", "devices", "dtypes", "formats")
    for name in sequences:
        values = getattr(capabilities, name, None)
        known[name] = None if values is None else list(values)
    known["deterministic"] = capabilities.deterministic if capabilities else None
    known["axis_aliases"] = (
        {str(key): axis for key, axis in capabilities.axis_aliases.items()} if capabilities else None
    )
    known["options"] = dict(capabilities.options) if capabilities else None
    return known


def transform_facts(transform: TransformPlugin) -> Facts:
    """Return all that is known of a transform; null where nothing is."""
    return _found_facts(transform, TRANSFORM.name)


def _found_facts(found: Found[S], kind: str) -> Facts:
    spec: Spec | None = found.spec
    state = found.availability
    return {
        "kind": kind,
        "name": found.name,
        "version": found.version or None,
        "distribution": found.distribution,
        "available": state.ok,
        "status": state.status,
        "reason": state.reason or None,
        "hint": state.hint or None,
        "summary": spec.summary or None if spec else None,
        "url": spec.url or None if spec else None,
    }


def print_found(all_found: Sequence[F], headings: Sequence[str], cells: Callable[[F], Sequence[str]]) -> None:
    """Print a table of what is installed, one line each, and below it why some cannot be used.

    Args:
        all_found: backends, or transforms.
        headings: those of the columns beside what both have.
        cells: what stands in these columns.
    """
    from rich.table import Table

    out = console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("name", "version", "distribution", "available", *headings):
        table.add_column(heading, no_wrap=heading == "name", overflow="fold")
    for found in all_found:
        origin = clean(found.name), clean(found.version) or "-", clean(found.distribution), status_word(found)
        style = "" if found.availability.ok else STYLES[found.availability.status]
        table.add_row(*origin, *cells(found), style=style)
    out.print(table, markup=False)
    for found in all_found:
        state = found.availability
        if not state.ok:
            reason = f"{clean(found.name)}: {clean(state.reason)}. Next step: {clean(state.hint)}"
            out.print(reason, markup=False, soft_wrap=not out.is_terminal)


def status_word(found: Found[Any]) -> str:
    """Return the status in the words of a table: ``"yes"`` for one that can be used."""
    return "yes" if found.availability.ok else found.availability.status


def clean(text: object) -> str:
    """Return `text` on one line and without control characters: plugins write it, and terminals obey it."""
    return one_line(str(text))


def _requirement(requirement: Requirement) -> Facts:
    installed = installed_version(requirement.distribution)
    return {"distribution": requirement.distribution, "minimum": requirement.minimum, "installed": installed}

"""A backend in plain builtins: what ``--json`` prints, and what the tables are made from."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TypeVar

from kvquant.plugin.spec import Requirement
from kvquant.registry import Backend
from kvquant.registry.availability import installed_version
from kvquant.registry.guard import one_line

T = TypeVar("T")
Facts = dict[str, object]

#: How a table shows a backend that cannot be used.
STYLES = {"missing": "yellow", "blocked": "yellow", "incompatible": "red", "broken": "red", "duplicate": "red"}


def quietly(look_up: Callable[[], T]) -> T:
    """Call `look_up` with whatever plugins print while they load on standard error; standard output is the result's."""
    with contextlib.redirect_stdout(sys.stderr):
        return look_up()


def facts(backend: Backend) -> Facts:
    """Return all that is known of a backend; null where nothing is, as of a broken one's capabilities."""
    spec, state = backend.spec, backend.availability
    capabilities = spec.capabilities if spec else None
    known: Facts = {
        "name": backend.name,
        "version": backend.version or None,
        "distribution": backend.distribution,
        "available": state.ok,
        "status": state.status,
        "reason": state.reason or None,
        "hint": state.hint or None,
        "summary": spec.summary or None if spec else None,
        "url": spec.url or None if spec else None,
        "requires": [_requirement(requirement) for requirement in spec.requires] if spec else None,
    }
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


def status_word(backend: Backend) -> str:
    """Return the status in the words of a table: ``"yes"`` for one that can be used."""
    return "yes" if backend.availability.ok else backend.availability.status


def clean(text: object) -> str:
    """Return `text` on one line and without control characters: plugins write it, and terminals obey it."""
    return one_line(str(text))


def _requirement(requirement: Requirement) -> Facts:
    installed = installed_version(requirement.distribution)
    return {"distribution": requirement.distribution, "minimum": requirement.minimum, "installed": installed}

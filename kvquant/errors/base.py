"""The base of all errors, and the words that messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class KVQuantError(Exception):
    """Base of every error that kvquant raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by parts: a worker process must be able to hand an error over, fields and all."""
        fields = dict(vars(self))
        if isinstance(self, ImportError):
            fields["name"] = self.name  # ImportError keeps it outside __dict__
        return _restore, (type(self), self.args, fields)


def _restore(kind: type[KVQuantError], args: tuple[Any, ...], fields: dict[str, Any]) -> KVQuantError:
    # The builtin whose layout it has: of two that it is, `kind.__new__` may find the other's, which refuses.
    layout: Any = kind
    while layout.__module__ != "builtins":
        layout = layout.__base__
    error: KVQuantError = layout.__new__(kind, *args)
    error.args = args
    for name, value in fields.items():
        setattr(error, name, value)
    return error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of `known`, or an empty string."""
    matches = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=3, cutoff=0.7)
    if not matches:
        return ""
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?"


def origin(distribution: str, version: str) -> str:
    """Return ``"kvquant-plugin-foo 1.2"``, or the distribution alone where there is no version."""
    return f"{distribution} {version}".rstrip()


def listing(items: Iterable[object]) -> str:
    """Return ``"a, b, c"``, or ``"none"`` when there are none."""
    return ", ".join(map(str, items)) or "none"

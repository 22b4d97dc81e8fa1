"""Options as people type them on a command line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from typing import Any

from kvquant.errors import OptionValueError


def parse_options(items: Iterable[str]) -> dict[str, Any]:
    """Return ``{"optimize": False, "tries": 3}`` for ``["optimize=false", "tries=3"]``.

    A value is a number, ``true``, ``false`` or ``null`` (in any case), or anything else in JSON; else it is a text.

    Raises:
        OptionValueError: an item has no name or no ``=``.
    """
    options: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name.strip() and equals):
            raise OptionValueError("option", item, "NAME=VALUE, for example optimize=false")
        options[name.strip()] = parse_value(value)
    return options


def parse_value(text: str) -> Any:
    """Return what a text stands for, as `parse_options` reads it."""
    for candidate in (text, text.strip().lower()):
        with contextlib.suppress(ValueError):
            return json.loads(candidate)
    return text


def looks_like_width(text: str) -> bool:
    """Whether a text is written like a number of bits: ``4`` or ``2.5``."""
    return text.replace(".", "", 1).isdecimal()


def parse_width(text: str) -> float:
    """Return 4 for ``"4"`` and 2.5 for ``"2.5"``.

    Raises:
        ValueError: it is written otherwise.
    """
    if not looks_like_width(text.strip()):
        raise ValueError(text)
    number = float(text)
    return int(number) if number.is_integer() else number


def parse_widths(text: str | None) -> tuple[float, ...] | None:
    """Return ``(2, 4)`` for ``"2,4"``, and None for None.

    Raises:
        OptionValueError: an item is no number.
    """
    if text is None:
        return None
    try:
        return tuple(parse_width(item) for item in text.split(","))
    except ValueError:
        raise OptionValueError("nbits", text, "numbers separated by commas, for example 2,4") from None

"""Options as people type them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvquant.errors import OptionValueError


def parse_options(items: Iterable[str]) -> dict[str, Any]:
    """Return ``{"optimize": False}`` for ``["optimize=false"]``; values are read as YAML, so numbers become numbers.

    Raises:
        OptionValueError: an item has no name or no ``=``.
    """
    import yaml

    options: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name.strip() and equals):
            raise OptionValueError("option", item, "NAME=VALUE, for example optimize=false")
        try:
            options[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            options[name.strip()] = value
    return options


def parse_widths(text: str | None) -> tuple[int, ...] | None:
    """Return ``(2, 4)`` for ``"2,4"``, and None for None.

    Raises:
        OptionValueError: an item is no whole number.
    """
    if text is None:
        return None
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError:
        raise OptionValueError("nbits", text, "whole numbers separated by commas, for example 2,4") from None

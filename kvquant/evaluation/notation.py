"""How caches are written: ``NAME[:NBITS...][:AXIS][:OPTION=VALUE...]``, with commas between several.

Values may be JSON, such as ``layers={"0":{"nbits":8},"2-5":{"nbits":2}}``: commas and colons within brackets, braces or
quotes separate nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvquant.engine.options import ALIASES
from kvquant.engine.typed import looks_like_width, parse_value, parse_width
from kvquant.errors import OptionValueError
from kvquant.plugin.capabilities import AXES

SYNTAX = (
    "BACKEND[:NBITS][:AXIS][:OPTION=VALUE], such as reference:4, hqq:2:group_size=32, "
    "reference:2:axis_key=token:sink_length=4, kivi-2 or transformers:quanto:4"
)

_OPENING, _CLOSING = "[{", "]}"


@dataclass(frozen=True)
class Written:
    """A cache as it is written.

    Attributes:
        text: all of it.
        names: what stands before all details: a backend or a preset, or two names, a distribution and its backend.
        widths: bits of codes.
        axes: of ``"channel"``, ``"token"``.
        options: by name, in order, with their values as `kvquant.engine.typed.parse_value` reads them.
    """

    text: str
    names: tuple[str, ...]
    widths: tuple[float, ...]
    axes: tuple[str, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The names as one."""
        return ":".join(self.names)

    def says(self, *options: str) -> bool:
        """Whether one of some options is among its own, by whatever name."""
        return any(ALIASES.get(option, option) in options for option in self.options)


def split_caches(text: str) -> list[str]:
    """Return the caches in a text, as they are written there."""
    return [part.strip() for part in _split(text, ",")]


def read_cache(text: str, option: str = "backends", syntax: str = SYNTAX) -> Written:
    """Read one cache; whether there is one of that name, and whether it can be had, is not looked at.

    Args:
        text: the cache.
        option: what a message calls the option.
        syntax: how it says that caches are written.

    Raises:
        OptionValueError: it is written in another way.
    """
    parts = [part.strip() for part in _split(text, ":")]
    names = [parts.pop(0)]
    if parts and not _is_detail(parts[0]):
        names.append(parts.pop(0))
    widths: list[float] = []
    axes: list[str] = []
    options: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not _is_detail(part):
            raise OptionValueError(option, text, syntax)
        if equals:
            options[name.strip()] = parse_value(value)
        elif part in AXES:
            axes.append(part)
        else:
            widths.append(parse_width(part))
    if not all(names):
        raise OptionValueError(option, text, syntax)
    return Written(text, tuple(names), tuple(widths), tuple(axes), options)


def written(value: Any) -> str:
    """Return an option's value so that it can be read again."""
    is_json = value is None or isinstance(value, (dict, list, tuple))
    if isinstance(value, str):
        is_json = parse_value(value) != value or bool(set(value) & set(',:"[]{}'))
    return json.dumps(value, separators=(",", ":")) if is_json else str(value)


def _is_detail(text: str) -> bool:
    return looks_like_width(text) or text in AXES or text.find("=") > 0


def _split(text: str, separator: str) -> Iterator[str]:
    """Yield what stands between separators that are in no brackets, braces or quotes."""
    start = depth = 0
    quoted = False
    for at, letter in enumerate(text):
        if letter == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif letter in _OPENING:
            depth += 1
        elif letter in _CLOSING:
            depth = max(0, depth - 1)
        elif letter == separator and not depth:
            yield text[start:at]
            start = at + 1
    yield text[start:]

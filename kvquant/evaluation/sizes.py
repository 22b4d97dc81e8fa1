"""Numbers of tokens and of bytes as people write them: ``4k``, ``24GB``; and bounds, so that what is shown holds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from kvquant.errors import OptionValueError

_UNITS = {"": 1, "k": 1024}
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTES |= {f"{letter}ib": 1 << shift for letter, shift in (("k", 10), ("m", 20), ("g", 30), ("t", 40))}


def parse_tokens(option: str, text: str) -> int:
    """Read a number of tokens; ``k`` stands for 1024.

    Raises:
        OptionValueError: something else is there.
    """
    found = re.fullmatch(r"(\d+)(k?)", text.strip().lower())
    if found is None or not int(found[1]):
        raise OptionValueError(option, text, "a number of tokens, such as 32768 or 32k")
    return int(found[1]) * _UNITS[found[2]]


def parse_contexts(text: str) -> tuple[int, ...]:
    """Read numbers of tokens separated by commas; ``k`` stands for 1024.

    Raises:
        OptionValueError: something else is there, or a number comes twice.
    """
    try:
        contexts = tuple(parse_tokens("contexts", part) for part in text.split(","))
    except OptionValueError:
        expected = "numbers of tokens separated by commas, such as 4k,32768"
        raise OptionValueError("contexts", text, expected) from None
    if len(set(contexts)) < len(contexts):
        raise OptionValueError("contexts", text, "each length once")
    return contexts


def parse_bytes(option: str, text: str) -> int:
    """Read a number of bytes; ``GB`` are powers of 1000 and ``GiB`` powers of 1024, as the standards have it.

    Raises:
        OptionValueError: something else is there.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b)", text.strip().lower())
    count = 0 if found is None else int(float(found[1]) * _BYTES.get(found[2], 0))
    if not count:
        raise OptionValueError(option, text, "a size with its unit, such as 24GB or 22.5GiB")
    return count


# ------------------------------------------------------------------------------------------------ bounds


def at_least(value: float, digits: int = 4) -> str:
    """Return a lower bound with so many digits, rounded up: who takes what is shown keeps it."""
    return _rounded(value, digits, math.ceil)


def at_most(value: float, digits: int = 4) -> str:
    """Return an upper bound with so many digits, rounded down."""
    return _rounded(value, digits, math.floor)


def bytes_at_least(count: float) -> str:
    """Return a lower bound of bytes in powers of 1024, rounded up, as `parse_bytes` reads it."""
    units = {"B": (1, 0), "KiB": (1 << 10, 1), "MiB": (1 << 20, 1), "GiB": (1 << 30, 2)}
    unit, (size, places) = next((one for one in units.items() if count < 1024 * one[1][0]), ("GiB", units["GiB"]))
    return f"{math.ceil(count / size * 10**places) / 10**places:.{places}f} {unit}"


def _rounded(value: float, digits: int, towards: Callable[[float], int]) -> str:
    if not value:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    near = round(value, places)
    # What rounding alone has put beyond a number of few digits is that number.
    exact = near if math.isclose(near, value, rel_tol=1e-9) else towards(value * 10**places) / 10**places
    return f"{exact:.{digits}g}"

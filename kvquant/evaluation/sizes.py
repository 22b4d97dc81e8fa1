"""Numbers of tokens and of bytes as people write them: ``4k``, ``24GB``."""

from __future__ import annotations

import re

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

"""Running a plugin's code without trusting it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_LONGEST = 300


class PluginError(Exception):
    """A plugin's code raised; what it raised is the `__cause__`.

    Attributes:
        problem: what it raised, on one line.
        details: its traceback.
    """

    def __init__(self, cause: BaseException) -> None:
        self.problem, self.details = describe(cause), "".join(traceback.format_exception(cause))
        super().__init__(self.problem)


def call_plugin(function: Callable[[], T]) -> T:
    """Call `function`, which runs a plugin's code.

    Raises:
        PluginError: it raised anything, even SystemExit, which would otherwise end the program without a word.
        KeyboardInterrupt: the user wants to stop.
    """
    try:
        return function()
    except KeyboardInterrupt:
        raise
    except BaseException as cause:  # panics of Rust extensions are no Exceptions either
        raise PluginError(cause) from cause


def describe(error: BaseException) -> str:
    """Return type and message of `error` on one line."""
    kind, message = type(error).__name__, message_of(error)
    return f"{kind}: {message}" if message else kind


def message_of(error: BaseException) -> str:
    """Return the message of `error` on one line; empty where it has none, or fails to say it."""
    try:
        return one_line(str(error))
    except Exception:  # noqa: BLE001 # the message is computed by the plugin's code, too
        return ""


def one_line(text: str) -> str:
    """Return `text` on one line, cut where it gets long, without control characters, which could forge output."""
    joined = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return joined if len(joined) <= _LONGEST else f"{joined[:_LONGEST]} [...]"

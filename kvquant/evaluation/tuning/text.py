"""The text of a tuning: a part that tunes, and one behind it, held out, that verifies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvquant.errors import OptionValueError
from kvquant.evaluation.perplexity import Windows, cut

#: Windows that verify, at least: one says nothing of others.
LEAST = 2


def split(
    text: Sequence[int], prefix: Sequence[int], length: int, prefill: int, tune: int, verify: int
) -> tuple[Windows, Windows]:
    """Cut a text into windows, and return the first of them and some that have no token in common with those.

    Args:
        text: its tokens.
        prefix: tokens that begin every window.
        length: tokens of a window.
        prefill: the first of them, fed in one pass.
        tune: windows of the first part.
        verify: windows of the second part, at most.

    Raises:
        OptionValueError: the text is too short.
    """
    step = length - prefill
    own = length + 1 - len(prefix)  # tokens of the text that a window is made of
    gap = -(-own // step) - 1  # windows that share tokens with the first part, and are left out
    needed = own + (tune + gap + LEAST - 1) * step
    if len(text) < needed:
        expected = (
            f"at least {needed} tokens, for {tune} windows of {length} that tune and {LEAST} behind them that verify; "
            "a shorter --length or fewer --windows need less"
        )
        raise OptionValueError("text", f"{len(text)} tokens", expected)
    windows = cut(text, prefix, length, prefill, tune + gap + verify)
    first, second = windows.tokens[:tune], windows.tokens[tune + gap :]
    return dataclasses.replace(windows, tokens=first), dataclasses.replace(windows, tokens=second, first=tune + gap)

"""Tokens that left the window with the last update, kept until the next so that it can be taken back.

Assisted decoding adds several candidates in one update and takes the rejected ones back. One by one, only the accepted
ones would have come: none of what the rejected ones pushed out would have left the window, and a candidate would have
seen in full precision what those after it pushed out. Both need the exact states for a moment longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from kvquant.engine.state import Saved, State


@dataclass(frozen=True, eq=False)
class Departed:
    """What left the window with the last tokens of an update.

    Attributes:
        states: exact, ``[batch, kv_heads, sink + quantised tokens, head_dim]``.
        sink: how many of them, the first, were set apart as sink.
        began: whether nothing was quantised before.
        steps: for each of these tokens of the update, in order, how many of the quantised ones had left when it came.
    """

    states: Tensor
    sink: int
    began: bool
    steps: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that were quantised."""
        return self.states.shape[2] - self.sink

    def staying(self, step: int) -> tuple[Tensor, int]:
        """Return what had not left yet at a value of `steps`, the sink with it if it had not been set apart either.

        Returns:
            The states, and how many of them are quantised.
        """
        whole = self.began and not step
        return self.states[:, :, 0 if whole else self.sink + step :], self.tokens - step

    def runs(self, queries: int) -> Iterator[tuple[int, int, int]]:
        """Yield ``(first, last, step)`` for runs of query tokens that saw the same; the last are those of `steps`."""
        steps = [0] * (queries - len(self.steps)) + list(self.steps)
        first = 0
        for step, run in groupby(steps):
            last = first + len(list(run))
            yield first, last, step
            first = last

    def without(self, tokens: int) -> tuple[Departed | None, int]:
        """Return what is left of it when the newest `tokens` tokens are taken back, and the value of `steps` then."""
        steps = self.steps[: max(0, len(self.steps) - tokens)]
        if not steps:
            return None, 0
        kept = self.states[:, :, : self.sink + steps[-1]]
        return (Departed(kept, self.sink, self.began, steps) if steps[-1] else None), steps[-1]

    def select(self, indices: Tensor) -> Departed:
        """Keep batch rows `indices`, in that order."""
        return Departed(self.states.index_select(0, indices), self.sink, self.began, self.steps)

    def state(self) -> State:
        """Return what it is, to be written down."""
        return State({"states": self.states}, {"sink": self.sink, "began": self.began, "steps": list(self.steps)})

    @classmethod
    def restored(cls, saved: Saved, shape: tuple[int, int, int], dtype: str, quantized: int) -> Departed:
        """Return one in a saved state.

        Args:
            saved: the state.
            shape: batch rows, heads and channels.
            dtype: of the states.
            quantized: tokens in the body.

        Raises:
            MisfitError: there can be none like it.
        """
        steps, began = saved.value("steps"), saved.value("began") is True
        if not isinstance(steps, list) or not steps or not all(type(step) is int for step in steps):
            raise saved.misfit("has no steps")
        if sorted(steps) != steps or steps[0] < 0 or not 0 < steps[-1] <= quantized:
            raise saved.misfit(f"has steps up to {steps[-1]}, of {quantized} quantised tokens")
        sink = saved.integer("sink", 0, 1 << 30)
        batch, heads, head_dim = shape
        states = saved.take("states", (batch, heads, sink + steps[-1], head_dim), [dtype])
        return cls(states, sink, began, tuple(steps))

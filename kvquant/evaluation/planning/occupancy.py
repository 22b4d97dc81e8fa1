"""How many tokens each part of a store holds, and has room for: the life of a store in integers.

The decisions are the engine's own (`kvquant.engine.window`); here they are carried out without tensors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from kvquant.engine.window import Extent, WindowPolicy


@dataclass(frozen=True)
class Occupancy:
    """Tokens of a store by part.

    Attributes:
        sink: tokens set apart as sink.
        pages: tokens of each page of the body, and the tokens that it has room for.
        recent: the buffer of all other tokens.
    """

    sink: int
    pages: tuple[tuple[int, int], ...]
    recent: Extent

    @property
    def body(self) -> int:
        """Quantised tokens."""
        return sum(length for length, _ in self.pages)


@functools.lru_cache(maxsize=1 << 12)
def occupancy(policy: WindowPolicy, prefill: int, decoded: int) -> Occupancy:
    """Return what a store holds after `prefill` tokens at once and `decoded` more, one at a time."""
    store = _Store(policy)
    store.append(prefill)
    for _ in range(decoded):
        store.append(1)
    return Occupancy(store.sink, tuple(zip(store.lengths, store.capacities, strict=True)), store.recent)


class _Store:
    """`kvquant.engine.store.Store` and its body, without their tensors."""

    def __init__(self, policy: WindowPolicy) -> None:
        self._policy = policy
        self._set_apart = False  # whether the sink is apart from the buffer
        self._seen = self._freed = 0
        self.sink, self.recent = 0, Extent()
        self.lengths: list[int] = []
        self.capacities: list[int] = []

    def append(self, tokens: int) -> None:
        policy, seen = self._policy, self._seen
        self._seen += tokens
        if not seen and (first := policy.first_kept(tokens)):
            self._set_apart, self._freed = True, first
            tokens -= first
        in_front = 0 if self._set_apart else policy.sink_length
        leaving = policy.leaving(len(self.recent) + tokens - in_front)
        dropped = leaving + in_front if leaving else 0
        if leaving:
            self.sink, self._set_apart = self.sink + in_front, True
            self._grow(leaving)
        from_buffer = min(dropped, len(self.recent))
        added = tokens - (dropped - from_buffer)
        self.recent = self.recent.appended(from_buffer, added, policy.slack, policy.most_recent)
        if policy.span is not None:
            self._free(seen - policy.span)

    def _grow(self, left: int) -> None:
        while left:
            if not self.lengths or self.lengths[-1] == self.capacities[-1]:
                self.capacities.append(self._policy.page_capacity(left, sum(self.lengths)))
                self.lengths.append(0)
            written = min(left, self.capacities[-1] - self.lengths[-1])
            self.lengths[-1] += written
            left -= written

    def _free(self, position: int) -> None:
        """Let go of what is held whole of tokens before `position`."""
        if not self._set_apart or position - self._freed < self.sink:
            return
        self._freed += self.sink
        self.sink = 0
        while self.lengths and self.lengths[0] <= position - self._freed:
            self._freed += self.lengths.pop(0)
            self.capacities.pop(0)

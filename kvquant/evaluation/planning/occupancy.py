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
        self.sink, self.recent = 0, Extent()
        self.lengths: list[int] = []
        self.capacities: list[int] = []

    def append(self, tokens: int) -> None:
        policy = self._policy
        in_front = policy.sink_length - self.sink
        leaving = policy.leaving(len(self.recent) + tokens - in_front)
        dropped = leaving + in_front if leaving else 0
        if leaving:
            self.sink = policy.sink_length
            self._grow(leaving)
        from_buffer = min(dropped, len(self.recent))
        added = tokens - (dropped - from_buffer)
        self.recent = self.recent.appended(from_buffer, added, policy.slack, policy.most_recent)

    def _grow(self, left: int) -> None:
        while left:
            if not self.lengths or self.lengths[-1] == self.capacities[-1]:
                self.capacities.append(self._policy.page_capacity(left, sum(self.lengths)))
                self.lengths.append(0)
            written = min(left, self.capacities[-1] - self.lengths[-1])
            self.lengths[-1] += written
            left -= written

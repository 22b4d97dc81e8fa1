"""The order in which a cache's layers are used, so that what the next one needs is fetched while one is at work."""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakValueDictionary


class Fetched(Protocol):
    """A layer whose quantised tokens lie in host memory."""

    index: int

    def prefetch(self) -> None:
        """Begin to bring them to the device."""

    def let_go(self) -> None:
        """Let go of what was brought there."""


class Lookahead:
    """Keeps the tokens of two layers on the device: of the one in use, and of that which came after it last time.

    The order is learned from use, in the first step: so it is that of any model, whose layers need not be known, and
    the first layer comes after the last.
    """

    def __init__(self) -> None:
        """Begin without an order."""
        self._layers: WeakValueDictionary[int, Fetched] = WeakValueDictionary()
        self._after: dict[int, int] = {}
        self._last: int | None = None
        self._near: list[int] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Lookahead, ()  # copies of a cache, and of a layer, learn it anew

    def turn(self, layer: Fetched) -> None:
        """Note that `layer` is about to be used: let the others go, fetch it, and begin to fetch the next."""
        self._layers[layer.index] = layer
        if self._last is not None and self._last != layer.index:
            self._after[self._last] = layer.index
        self._last = layer.index
        ahead = self._layers.get(self._after.get(layer.index, layer.index), layer)
        wanted = dict.fromkeys((layer.index, ahead.index))
        for index in self._near:
            if index not in wanted and (other := self._layers.get(index)) is not None:
                other.let_go()
        self._near = list(wanted)
        layer.prefetch()
        ahead.prefetch()

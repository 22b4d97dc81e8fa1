"""A cache in use, whoever made it: what it holds, and when it quantises again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Cache
from transformers.cache_utils import QuantizedLayer as TransformersQuantizedLayer

from kvquant.cache.cache import QuantizedCache
from kvquant.cache.layer import QuantizedLayer
from kvquant.evaluation.measure import held_bytes


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of all tensors that any cache holds."""
    return cache.nbytes if isinstance(cache, QuantizedCache) else held_bytes(*cache.layers)


def read_bytes(cache: Cache) -> int:
    """Return the bytes that attention over a cache must read at least: all that it holds, without spare room."""
    if not isinstance(cache, QuantizedCache):
        return cache_bytes(cache)
    report = cache.memory_report()
    return report.nbytes - report.parts["spare"]


def attention_of(cache: Cache) -> str:
    """Return what attends over the quantised tokens of one of kvquant's caches, in words; empty for others."""
    return cache.memory_report().attention if isinstance(cache, QuantizedCache) else ""


@dataclass(frozen=True)
class Flush:
    """When a cache quantises again.

    Attributes:
        tokens_left: tokens to append until it does; the last of them is the one that costs.
        period: tokens from one time to the next.
    """

    tokens_left: int
    period: int


def next_flush(cache: Cache) -> Flush | None:
    """Return when tokens next leave a cache's window to be quantised; None for a cache that never quantises."""
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if isinstance(layer, QuantizedLayer):
            store, _ = layer.stores
            left = 1
            while not store.leaving(left):
                left += 1
            return Flush(left, store.body.encoder.block)
        if isinstance(layer, TransformersQuantizedLayer):
            waiting = layer.keys.shape[-2] if layer.keys.dim() == 4 else 0
            # It flushes when the window is full with the new tokens; no sooner than the next one.
            return Flush(max(1, layer.residual_length - waiting), layer.residual_length)
    return None

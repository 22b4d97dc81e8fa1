"""Which attention runs over packed stores. There is one so far, in plain torch."""

from __future__ import annotations

from torch import Tensor

from kvquant.attention import tiles
from kvquant.attention.counters import counters
from kvquant.engine.store import Store


def attend(
    query: Tensor, keys: Store, values: Store, mask: Tensor | None, *, is_causal: bool, scale: float | None
) -> Tensor:
    """Attend over packed stores; arguments and result are those of `tiles.attend`."""
    counters.fused += 1
    return tiles.attend(query, keys, values, mask, is_causal=is_causal, scale=scale)

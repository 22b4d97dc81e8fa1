"""The frame in which a stream is quantised: smoothed, then mapped by a transform; and what that does to attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvquant.transforms.heads import HeadTransform
from kvquant.transforms.smoothing import Smoothing


@dataclass(frozen=True, eq=False)
class Frame:
    """What is done to states before they are quantised, and how attention goes without undoing it.

    Attributes:
        smoothing: the first step, None for none.
        transform: the second, a rotation for instance; None for none.
    """

    smoothing: Smoothing | None = None
    transform: HeadTransform | None = None

    def enter(self, states: Tensor) -> Tensor:
        """Return states ``[batch, kv_heads, tokens, head_dim]`` as they are quantised."""
        smooth = states if self.smoothing is None else self.smoothing.apply(states)
        return smooth if self.transform is None else self.transform.apply(smooth)

    def leave(self, states: Tensor) -> Tensor:
        """Undo `enter`."""
        smooth = states if self.transform is None else self.transform.undo(states)
        return smooth if self.smoothing is None else self.smoothing.undo(smooth)

    def query(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what to multiply keys with as they are quantised, and what is added to each query's scores then.

        With key ``k = center + spread * smooth`` a score is ``q . k = q . center + (q * spread) . smooth``.

        Args:
            query: ``[batch, kv_heads, rows, head_dim]``.

        Returns:
            The query in this frame, and ``[batch, kv_heads, rows]`` or None for nothing.
        """
        shift = None
        if self.smoothing is not None:
            shift = (query * self.smoothing.center.to(query)).sum(-1)
            query = query * self.smoothing.spread.to(query)
        return query if self.transform is None else self.transform.apply_to_query(query), shift

    def mixture(self, mixed: Tensor, total: Tensor) -> Tensor:
        """Return a weighted sum of values that were summed as they are quantised.

        Args:
            mixed: ``[batch, kv_heads, rows, head_dim]``.
            total: the sum of the weights, ``[batch, kv_heads, rows]``.
        """
        smooth = mixed if self.transform is None else self.transform.undo(mixed)
        if self.smoothing is None:
            return smooth
        return smooth * self.smoothing.spread.to(mixed) + total.unsqueeze(-1) * self.smoothing.center.to(mixed)

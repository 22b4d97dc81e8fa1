"""Smoothing: channels are centred, and outlier channels scaled down, by what the first quantised block says of them.

A channel of keys often lies far from zero, with little spread around its mean (a bias, or a slow rotary frequency), and
a few channels spread many times as far as all others. Both cost bits where channels share a scale. A mean that is
taken off the keys adds the same to all scores of a query, and one that is taken off the values comes back once, in
the output; a factor on a channel of the keys goes to the query (SageAttention, Zhang et al., arXiv 2410.02367, section
4.2, takes off the mean; SmoothQuant, Xiao et al., arXiv 2211.10438, moves factors). So nothing is done to the history.

For values the means matter most: an error in them is the same for every token of a block, and a mean of many values
does not average it away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: How many times the typical spread a channel may have before it is scaled down to that.
OUTLIER = 2.0


@dataclass(frozen=True, eq=False)
class Smoothing:
    """What was found out about the channels of each head: ``smooth = (states - center) / spread``.

    Attributes:
        center: float16 ``[batch, kv_heads, 1, head_dim]``, means of the channels. They need not be exact: what is taken
            off is what is put back.
        spread: the same shape, 1 for a channel whose standard deviation is at most `OUTLIER` times the median of those
            of its head, else how many times that it is.
    """

    center: Tensor
    spread: Tensor

    @classmethod
    def fit(cls, states: Tensor) -> Smoothing:
        """Look at some tokens. Batch rows and heads do not depend on one another.

        Args:
            states: ``[batch, kv_heads, tokens, head_dim]``, at least one token.
        """
        # In float64, so that the order of a sum does not show in what is rounded.
        exact = states.double()
        center = exact.mean(dim=2, keepdim=True)
        deviation = (exact - center).square().mean(dim=2, keepdim=True).sqrt()
        typical = OUTLIER * deviation.median(dim=3, keepdim=True).values
        # Where most channels do not vary at all, none of the others is an outlier.
        spread = torch.where(typical > 0, deviation / torch.where(typical > 0, typical, 1), 1)
        most = torch.finfo(torch.float16).max
        return cls(center.clamp(-most, most).half(), spread.clamp(1, most).half())

    def apply(self, states: Tensor) -> Tensor:
        """Return smooth states, in their own type."""
        return (states - self.center.to(states)) / self.spread.to(states)

    def undo(self, states: Tensor) -> Tensor:
        """Return states as they were before `apply`."""
        return states * self.spread.to(states) + self.center.to(states)

    def select(self, indices: Tensor) -> Smoothing:
        """Return what belongs to batch rows `indices`, in that order."""
        return Smoothing(self.center.index_select(0, indices), self.spread.index_select(0, indices))

    def to(self, device: torch.device) -> Smoothing:
        """Return the same on `device`."""
        return Smoothing(self.center.to(device), self.spread.to(device))

"""States that backends are compared on: seeded random numbers whose law is written down here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: One channel in so many is an outlier.
OUTLIER_PERIOD = 16
#: An outlier channel is larger than the others by a factor between these.
OUTLIER_FACTORS = (10.0, 20.0)


def gaussian_states(heads: int, tokens: int, head_dim: int, seed: int) -> Tensor:
    """Return unit normal states ``[1, heads, tokens, head_dim]``, float32."""
    return torch.randn(1, heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed))


def outlier_states(heads: int, tokens: int, head_dim: int, seed: int) -> Tensor:
    """Return states with outlier channels ``[1, heads, tokens, head_dim]``, float32: a model of keys.

    In the keys of language models a few channels of a head are large for all tokens (KIVI, arXiv 2402.02750). Here one
    channel in sixteen of each head (at least one), chosen at random, has the numbers ``factor * (sign + noise)``:
    `noise` is unit normal for each token; `factor`, even between 10 and 20, and `sign`, plus or minus 1, are one for
    the channel, so that its mean is as large as its deviation. All other channels are unit normal.
    """
    generator = torch.Generator().manual_seed(seed + 1)  # numbers of their own
    states = torch.randn(1, heads, tokens, head_dim, generator=generator)
    low, high = OUTLIER_FACTORS
    for head in range(heads):
        channels = torch.randperm(head_dim, generator=generator)[: max(1, head_dim // OUTLIER_PERIOD)]
        factors = low + (high - low) * torch.rand(len(channels), generator=generator)
        signs = torch.randint(0, 2, (len(channels),), generator=generator) * 2 - 1
        states[0, head, :, channels] = (states[0, head, :, channels] + signs) * factors
    return states


#: Kind of states -> what makes them.
STATES: dict[str, Callable[[int, int, int, int], Tensor]] = {"gaussian": gaussian_states, "outliers": outlier_states}

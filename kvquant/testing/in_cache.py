"""A plugin in a cache, as users meet it: filled, attended to, reordered and cropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvquant.cache.cache import QuantizedCache
from kvquant.testing import data
from kvquant.testing.check import require

#: Nothing is kept exact, and nothing but the plugin has a hand in what is stored.
_PLAIN = {"residual_length": 0, "smoothing_key": False, "smoothing_value": False, "scale_bits": 16}

#: Keys and values, or what came back of them.
Streams = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class InCache:
    """Caches of some options, and what goes into them.

    Attributes:
        options: those of the cache.
        head_dim: channels of a head.
        block: tokens that are quantised at once.
        dtype, device: of the states.
    """

    options: Mapping[str, Any]
    head_dim: int
    block: int
    dtype: torch.dtype
    device: str

    @property
    def tokens(self) -> int:
        """Three blocks and a few tokens."""
        return 3 * self.block + 5

    def states(self, tokens: int, heads: int = 2, seed: int = 0) -> Tensor:
        """Return normal numbers, ``[2, heads, tokens, head_dim]``, the same at every call."""
        numbers = data.gaussian(2 * heads * tokens, self.head_dim, seed)
        return numbers.reshape(2, heads, tokens, self.head_dim).to(self.device, self.dtype)

    def streams(self) -> Streams:
        """Return keys and values."""
        states = self.states(self.tokens)
        return states, states.flip(2)

    def filled(self, sizes: Sequence[int] | None = None) -> QuantizedCache:
        """Return a cache that was given the keys and values in parts of these sizes, or at once."""
        made = QuantizedCache(**{**_PLAIN, **self.options})
        parts = (stream.split(list(sizes or [self.tokens]), dim=2) for stream in self.streams())
        for keys, values in zip(*parts, strict=True):
            made.update(keys, values, 0)
        return made

    def require_kept(self, *, in_parts: bool = True) -> None:
        """Raise CheckFailed unless append, reorder and crop leave the states as they were stored.

        Args:
            in_parts: whether states appended in parts must be those appended at once.
        """
        cache = self.filled()
        stored = held(cache)
        if in_parts:
            block = self.block
            parts = self.filled([block, 1, block + 3, self.tokens - 2 * block - 4])
            require(_equal(stored, held(parts)), "states appended in parts differ from states appended at once")
        cache.reorder_cache(torch.tensor([1, 0], device=self.device))
        stored = (stored[0].flip(0), stored[1].flip(0))
        require(_equal(held(cache), stored), "reordering changed the states")
        cache.crop(-7)
        stored = (stored[0][:, :, :-7], stored[1][:, :, :-7])
        require(_equal(held(cache), stored), "crop changed the states that stay")

    def require_attention(self, condition: float = 1) -> str:
        """Raise CheckFailed unless attention is that over the dequantised states; return what attended.

        Args:
            condition: how much larger than its own rounding the plugin may make that of the type.
        """
        cache = self.filled()
        extra, query = self.states(1, seed=3), self.states(1, heads=4, seed=4)
        lazy_keys, lazy_values = cache.update(extra, extra, 0)
        fused = scaled_dot_product_attention(query, lazy_keys, lazy_values, enable_gqa=True)
        keys, values = held(cache)
        plain = scaled_dot_product_attention(query.double(), keys.double(), values.double(), enable_gqa=True)
        # Rounding of the type: of scores, which exp makes an error of the weights, and of values.
        scores = float(query.double().abs().sum(dim=3).max() * keys.double().abs().max()) / self.head_dim**0.5
        allowed = 16 * torch.finfo(self.dtype).eps * condition * (1 + scores) * float(values.abs().max())
        worst = float((fused.detach().double() - plain).abs().max())
        require(worst <= allowed, f"attention is off by {worst:.3g} from that over the dequantised states")
        return f"by {cache.memory_report().attention}"


def held(cache: QuantizedCache) -> Streams:
    """Return copies of the keys and values that a cache holds."""
    layer = cache.layers[0]
    return layer.keys.detach().clone(), layer.values.detach().clone()


def _equal(one: Streams, other: Streams) -> bool:
    return all(torch.equal(mine, yours) for mine, yours in zip(one, other, strict=True))

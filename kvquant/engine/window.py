"""Which tokens stay exact and which are quantised: integers only, no tensors.

| sink | body (whole blocks, quantised) | window |
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WindowPolicy:
    """When tokens leave the window for the body.

    Attributes:
        sink_length: first tokens, kept in full precision for ever.
        residual_length: most recent tokens that are kept in full precision at least.
        block: tokens that are quantised at once.
    """

    sink_length: int
    residual_length: int
    block: int

    def leaving(self, window: int) -> int:
        """Return how many of the oldest tokens of a window of `window` tokens leave it now: whole blocks only.

        The answer depends on nothing but the window's length, so a sequence of appends ends in the same partition
        however it was split.
        """
        return max(0, (window - self.residual_length) // self.block) * self.block

    @property
    def most_recent(self) -> int:
        """Tokens that are in full precision and not set apart as sink, at most, between two updates."""
        return self.sink_length + self.residual_length + self.block - 1

    @property
    def page_tokens(self) -> int:
        """Tokens of the smallest page of the body: a multiple of the block, so that only a crop can split a group."""
        return -(-max(256, 2 * self.block) // self.block) * self.block

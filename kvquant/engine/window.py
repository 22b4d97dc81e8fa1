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
    most: int | None = None

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

    def page_capacity(self, left: int, stored: int) -> int:
        """Return the tokens that a new page of the body has room for: whole blocks, see `body.Body`.

        Args:
            left: tokens at hand for it.
            stored: tokens that the pages before it hold.
        """
        return max(left, self.page_tokens, stored // 8) // self.block * self.block


@dataclass(frozen=True)
class Extent:
    """Where the tokens of a buffer lie: from `start` to `stop`, with room for `capacity`."""

    start: int = 0
    stop: int = 0
    capacity: int = 0

    def __len__(self) -> int:
        return self.stop - self.start

    def fits(self, added: int) -> bool:
        """Whether `added` tokens find room behind those held."""
        return self.stop + added <= self.capacity

    def appended(self, dropped: int, added: int, slack: int, most: int) -> Extent:
        """Return the extent after the oldest `dropped` tokens are forgotten and `added` come in at the back.

        Tokens that find no room move to the front of a new buffer, with room to spare for some more.

        Args:
            dropped, added: numbers of tokens.
            slack, most: see `buffer_capacity`.
        """
        if self.fits(added):
            return Extent(self.start + dropped, self.stop + added, self.capacity)
        tokens = len(self) - dropped + added
        return Extent(0, tokens, buffer_capacity(tokens, slack, most))


def buffer_capacity(tokens: int, slack: int, most: int) -> int:
    """Return the tokens that a new buffer for `tokens` tokens has room for: an eighth more, or `slack`.

    Args:
        tokens: that it will hold now.
        slack: spare tokens to allow when it is small.
        most: tokens that it will hold at most, as far as is known; no room is made beyond them in advance.
    """
    return max(tokens, min(most, tokens + max(slack, tokens // 8)))

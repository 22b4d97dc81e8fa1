"""Which tokens stay exact and which are quantised: integers only, no tensors.

| sink | body (whole blocks, quantised) | window |

A layer of sliding-window attention forgets its oldest tokens: those that no query will see again.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Blocks of a span that are quantised, at least, for it to be worth it.
_FEW_BLOCKS = 4


@dataclass(frozen=True)
class WindowPolicy:
    """When tokens leave the window for the body.

    Attributes:
        sink_length: first tokens, kept in full precision for ever.
        residual_length: most recent tokens that are kept in full precision at least.
        block: tokens that are quantised at once.
        span: the most tokens that a later query sees; None for all there are.
        most: tokens that there is room for from the start, in a cache of fixed size; None where room is made as needed.
    """

    sink_length: int
    residual_length: int
    block: int
    span: int | None = None
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
        recent = self.sink_length + self.residual_length + self.block - 1
        return recent if self.most is None else min(recent, self.most)

    @property
    def slack(self) -> int:
        """Spare tokens to allow for them when they are few."""
        return self.block if self.most is None else self.most_recent

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
        if self.span is not None:
            # What is out of view is given back a page at a time.
            return max(self.page_tokens, self.span // 8) // self.block * self.block
        if self.most is not None:
            return max(left, self.leaving(self.most - self.sink_length) - stored) // self.block * self.block
        return max(left, self.page_tokens, stored // 8) // self.block * self.block

    def spare(self, stored: int) -> int:
        """Return how many tokens the last page of the body may have room for beside those that it holds.

        Args:
            stored: tokens that the body holds.
        """
        return max(self.page_tokens, stored // 8, (self.span or 0) // 8) if self.most is None else self.most

    @property
    def pays(self) -> bool:
        """Whether so much of the span is quantised that it is worth it: a few blocks beside sink and window."""
        exact = self.sink_length + self.residual_length
        return self.span is None or self.span >= exact + _FEW_BLOCKS * self.block

    def first_kept(self, tokens: int) -> int:
        """Return the first of `tokens` tokens that an empty store needs to take when they come at once.

        Blocks begin where they would begin if all had been taken, so that the same tokens share a scale.
        """
        in_body = tokens - (tokens if self.span is None else self.span) - self.sink_length
        return self.sink_length + in_body // self.block * self.block if in_body >= self.block else 0


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

"""Full-precision tokens at the recent end of a sequence: appended at the back, dropped from either end."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenBuffer:
    """Tokens ``[batch, kv_heads, tokens, head_dim]`` in a preallocated tensor.

    Appending writes into spare capacity. When that runs out the tokens move to the front, into the room that dropped
    ones have left, or else into a tensor an eighth (or `slack`) larger, so that n appends cost O(n).
    """

    def __init__(self, like: Tensor, slack: int, most: int) -> None:
        """Make an empty buffer.

        Args:
            like: ``[batch, kv_heads, any, head_dim]``, gives shape, dtype and device.
            slack: spare tokens to allow when the buffer is small.
            most: tokens that it will hold at most, as far as is known; no room is made beyond them in advance.
        """
        self._slack, self._most = slack, most
        self._start = self._stop = 0
        self.data = like.new_empty((*like.shape[:2], 0, like.shape[3]))

    def __len__(self) -> int:
        return self._stop - self._start

    def view(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return tokens `start` to `stop` (all by default) without a copy."""
        end = self._stop if stop is None else self._start + stop
        return self.data[:, :, self._start + start : end]

    def append(self, states: Tensor) -> None:
        """Add `states` ``[batch, kv_heads, tokens, head_dim]`` at the back."""
        added = states.shape[2]
        if self._stop + added > self.data.shape[2]:
            self._make_room(added)
        self.data[:, :, self._stop : self._stop + added] = states
        self._stop += added

    def drop_front(self, tokens: int) -> None:
        """Forget the oldest `tokens`."""
        self._start += tokens
        if self._start == self._stop:
            self._start = self._stop = 0

    def drop_back(self, tokens: int) -> None:
        """Forget the newest `tokens`, and give memory back that is now out of proportion."""
        self._stop -= tokens
        if self.data.shape[2] > self._capacity_for(len(self)):
            self._move(self._capacity_for(len(self)))

    def push_front(self, states: Tensor) -> None:
        """Put `states` before the oldest token."""
        kept = self.view().clone()
        self._start = self._stop = 0
        self.append(states)
        self.append(kept)

    def select(self, indices: Tensor) -> None:
        """Keep batch rows `indices` (int64 ``[new_batch]``), in that order."""
        self.data = self.data.index_select(0, indices)

    def to(self, device: torch.device) -> None:
        """Move to `device`."""
        self.data = self.data.to(device)

    def _capacity_for(self, tokens: int) -> int:
        return max(tokens, min(self._most, tokens + max(self._slack, tokens // 8)))

    def _make_room(self, added: int) -> None:
        needed = len(self) + added
        if needed <= self.data.shape[2]:
            # Moving within the tensor must go through a copy because source and target overlap.
            self.data[:, :, : len(self)] = self.view().clone()
            self._start, self._stop = 0, len(self)
        else:
            self._move(self._capacity_for(needed))

    def _move(self, capacity: int) -> None:
        tokens = self.view()
        data = self.data.new_empty((*self.data.shape[:2], capacity, self.data.shape[3]))
        data[:, :, : tokens.shape[2]] = tokens
        self.data, self._start, self._stop = data, 0, tokens.shape[2]

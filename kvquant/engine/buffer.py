"""Full-precision tokens at the recent end of a sequence: appended at the back, dropped from either end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """What a buffer will be: its tensor, and which of its tokens are held."""

    data: Tensor
    start: int
    stop: int


class TokenBuffer:
    """Tokens ``[batch, kv_heads, tokens, head_dim]`` in a preallocated tensor.

    Appending writes into spare capacity. When that runs out the tokens move to a new tensor that is an eighth (or
    `slack`) larger than they are, so that n appends cost O(n).
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

    def plan(self, dropped: int, states: Tensor) -> Plan:
        """Write `states` behind the tokens held, less the oldest `dropped`, without making it count.

        All that can fail, memory above all, happens here; `apply` only assigns. What has been handed out as a view
        is not written to.

        Args:
            dropped: tokens to forget at the front.
            states: ``[batch, kv_heads, tokens, head_dim]`` to add at the back.
        """
        data, start, stop = self.data, self._start + dropped, self._stop
        if stop + states.shape[2] > data.shape[2]:
            data = self._moved(dropped, stop - start + states.shape[2])
            start, stop = 0, stop - start
        data[:, :, stop : stop + states.shape[2]] = states
        return Plan(data, start, stop + states.shape[2])

    def apply(self, plan: Plan) -> None:
        """Make a plan count."""
        self.data, self._start, self._stop = plan.data, plan.start, plan.stop

    def append(self, states: Tensor) -> None:
        """Add `states` ``[batch, kv_heads, tokens, head_dim]`` at the back."""
        self.apply(self.plan(0, states))

    def drop_front(self, tokens: int) -> None:
        """Forget the oldest `tokens`."""
        self._start += tokens

    def drop_back(self, tokens: int) -> None:
        """Forget the newest `tokens`, and give memory back that is now out of proportion."""
        self._stop -= tokens
        if self.data.shape[2] > self._capacity_for(len(self)):
            self.apply(Plan(self._moved(0, len(self)), 0, len(self)))

    def push_front(self, states: Tensor) -> None:
        """Put `states` before the oldest token."""
        tokens = torch.cat([states, self.view()], dim=2)
        self.apply(Plan(tokens, 0, tokens.shape[2]))

    def select(self, indices: Tensor) -> None:
        """Keep batch rows `indices` (int64 ``[new_batch]``), in that order."""
        self.data = self.data.index_select(0, indices)

    def to(self, device: torch.device) -> None:
        """Move to `device`."""
        self.data = self.data.to(device)

    def _capacity_for(self, tokens: int) -> int:
        return max(tokens, min(self._most, tokens + max(self._slack, tokens // 8)))

    def _moved(self, dropped: int, tokens: int) -> Tensor:
        """Return a tensor with room for `tokens` tokens and some more, that starts with those held but `dropped`."""
        held = self.view(dropped)
        data = self.data.new_empty((*self.data.shape[:2], self._capacity_for(tokens), self.data.shape[3]))
        data[:, :, : held.shape[2]] = held
        return data

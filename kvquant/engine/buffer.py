"""Full-precision tokens at the recent end of a sequence: appended at the back, dropped from either end."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvquant.engine.state import Saved, State, dtype_name
from kvquant.engine.window import Extent, buffer_capacity


@dataclass(frozen=True, eq=False)
class Plan:
    """What a buffer will be: its tensor, and which of its tokens are held."""

    data: Tensor
    extent: Extent


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
        self._extent = Extent()
        self.data = like.new_empty((*like.shape[:2], 0, like.shape[3]))

    def __len__(self) -> int:
        return len(self._extent)

    def view(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return tokens `start` to `stop` (all by default) without a copy."""
        first = self._extent.start
        end = self._extent.stop if stop is None else first + stop
        return self.data[:, :, first + start : end]

    def plan(self, dropped: int, states: Tensor) -> Plan:
        """Write `states` behind the tokens held, less the oldest `dropped`, without making it count.

        All that can fail, memory above all, happens here; `apply` only assigns. What has been handed out as a view
        is not written to.

        Args:
            dropped: tokens to forget at the front.
            states: ``[batch, kv_heads, tokens, head_dim]`` to add at the back.
        """
        added = states.shape[2]
        extent = self._extent.appended(dropped, added, self._slack, self._most)
        data = self.data if self._extent.fits(added) else self._moved(dropped, extent.capacity)
        data[:, :, extent.stop - added : extent.stop] = states
        return Plan(data, extent)

    def apply(self, plan: Plan) -> None:
        """Make a plan count."""
        self.data, self._extent = plan.data, plan.extent

    def append(self, states: Tensor) -> None:
        """Add `states` ``[batch, kv_heads, tokens, head_dim]`` at the back."""
        self.apply(self.plan(0, states))

    def drop_front(self, tokens: int) -> None:
        """Forget the oldest `tokens`."""
        self._extent = replace(self._extent, start=self._extent.start + tokens)

    def drop_back(self, tokens: int) -> None:
        """Forget the newest `tokens`, and give memory back that is now out of proportion."""
        self._extent = replace(self._extent, stop=self._extent.stop - tokens)
        held, capacity = len(self), buffer_capacity(len(self), self._slack, self._most)
        if self._extent.capacity > capacity:
            self.apply(Plan(self._moved(0, capacity), Extent(0, held, capacity)))

    def push_front(self, states: Tensor) -> None:
        """Put `states` before the oldest token."""
        tokens = torch.cat([states, self.view()], dim=2)
        self.apply(Plan(tokens, Extent(0, tokens.shape[2], tokens.shape[2])))

    def select(self, indices: Tensor) -> None:
        """Keep batch rows `indices` (int64 ``[new_batch]``), in that order."""
        self.data = self.data.index_select(0, indices)

    def moved(self, device: torch.device) -> TokenBuffer:
        """Return the same buffer on `device`."""
        buffer = copy.copy(self)
        buffer.data = self.data.to(device)
        return buffer

    def state(self) -> State:
        """Return the tokens held and how they lie; what is in spare room is left out."""
        extent = self._extent
        meta = {"start": extent.start, "stop": extent.stop, "capacity": extent.capacity}
        return State({"tokens": self.view()} if len(self) else {}, meta)

    def restore(self, saved: Saved) -> None:
        """Take on a saved state. The tokens are copied to where they lay, so that all goes on as it would have.

        Raises:
            MisfitError: it is not one of a buffer like this.
        """
        capacity = saved.integer("capacity")
        stop = saved.integer("stop", 0, capacity)
        extent = Extent(saved.integer("start", 0, stop), stop, capacity)
        if capacity > max(self._most, len(extent)):
            raise saved.misfit(f"has room for {capacity} tokens, and never needs more than {self._most}")
        batch, heads, _, head_dim = self.data.shape
        data = self.data.new_empty((batch, heads, capacity, head_dim))
        if len(extent):
            shape = (batch, heads, len(extent), head_dim)
            data[:, :, extent.start : extent.stop] = saved.take("tokens", shape, [dtype_name(data.dtype)])
        self.apply(Plan(data, extent))

    def _moved(self, dropped: int, capacity: int) -> Tensor:
        """Return a tensor with room for `capacity` tokens that starts with those held, less the oldest `dropped`."""
        held = self.view(dropped)
        data = self.data.new_empty((*self.data.shape[:2], capacity, self.data.shape[3]))
        data[:, :, : held.shape[2]] = held
        return data

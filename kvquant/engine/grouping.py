"""Axes to rows and back: which numbers share a scale.

States are ``[batch, kv_heads, tokens, head_dim]``. A group never crosses a batch row or a head, on either axis:

- ``"channel"``: `group_size` consecutive tokens of one channel share a scale; the grid of scales is
  ``[batch, kv_heads, tokens / group_size, head_dim]`` (keys in KIVI, arXiv 2402.02750).
- ``"token"``: `group_size` consecutive channels of one token share a scale; the grid of scales is
  ``[batch, kv_heads, tokens, head_dim / group_size]`` (values in KIVI).
"""

from __future__ import annotations

import math

from torch import Tensor

from kvquant.plugin.spec import Axis

#: Tokens that leave the window together when no stream needs whole groups of tokens: enough to share a call's cost.
TOKEN_AXIS_BLOCK = 32


def block_tokens(groups: list[tuple[Axis, int]]) -> int:
    """Return the tokens of a block, the smallest run that every stream can quantise at once.

    Args:
        groups: axis and group size of each stream.
    """
    sizes = [group_size for axis, group_size in groups if axis == "channel"]
    return math.lcm(*sizes) if sizes else TOKEN_AXIS_BLOCK


def states_to_rows(states: Tensor, axis: Axis, group_size: int) -> Tensor:
    """Lay out states as rows that share a scale.

    Args:
        states: ``[batch, kv_heads, tokens, head_dim]``; tokens (axis ``"channel"``) or head_dim (axis ``"token"``) a
            multiple of `group_size`.

    Returns:
        ``[n_groups, group_size]``, in the order of the grid of scales, contiguous.
    """
    if axis == "channel":
        groups: Tensor = states.unflatten(2, (-1, group_size))
        return groups.transpose(3, 4).reshape(-1, group_size)
    return states.reshape(-1, group_size)


def rows_to_states(rows: Tensor, shape: tuple[int, int, int, int], axis: Axis, group_size: int) -> Tensor:
    """Undo `states_to_rows`; `shape` is that of the states."""
    batch, heads, tokens, head_dim = shape
    if axis == "channel":
        return rows.reshape(batch, heads, tokens // group_size, head_dim, group_size).transpose(3, 4).flatten(2, 3)
    return rows.reshape(shape)


def scale_grid_shape(shape: tuple[int, int, int, int], axis: Axis, group_size: int) -> tuple[int, int, int, int]:
    """Return the shape of the grid of scales of states of `shape`."""
    batch, heads, tokens, head_dim = shape
    if axis == "channel":
        return batch, heads, tokens // group_size, head_dim
    return batch, heads, tokens, head_dim // group_size


def grouped(states: Tensor, axis: Axis, group_size: int) -> Tensor:
    """View states so that a grid of scales with one dimension added (`grouped_grid`) broadcasts over them.

    Returns:
        ``[batch, kv_heads, tokens / group_size, group_size, head_dim]`` (axis ``"channel"``) or
        ``[batch, kv_heads, tokens, head_dim / group_size, group_size]`` (axis ``"token"``).
    """
    groups: Tensor = states.unflatten(2 if axis == "channel" else 3, (-1, group_size))
    return groups


def ungrouped(states: Tensor, axis: Axis) -> Tensor:
    """Undo `grouped`."""
    return states.flatten(2, 3) if axis == "channel" else states.flatten(3, 4)


def grouped_grid(grid: Tensor, axis: Axis) -> Tensor:
    """View a grid of scales so that it broadcasts over `grouped` states."""
    return grid.unsqueeze(3) if axis == "channel" else grid.unsqueeze(4)

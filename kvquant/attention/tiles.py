"""Attention over a store in bounded tiles, in plain torch: exact to rounding, for every format, on every device.

The softmax runs along: each tile's part is merged into what came before through its maximum and its sum (online
softmax, Milakov and Gimelshein, arXiv 1805.02867; the same merge as in flash attention).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvquant.attention.outliers import Asked, with_outliers
from kvquant.attention.parts import Kernel, Part, Running, apply_mask, query_tokens, soft_capped
from kvquant.engine.body import Body
from kvquant.engine.store import Store

#: Numbers that a tile's keys and values, or its scores, may have: 4 MiB in float32.
TILE_ELEMENTS = 1 << 20
#: Query tokens attended at once: more would shrink the tiles until merging them costs more than reading them.
QUERY_TOKENS = 128
_FEWEST_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Exact:
    """States ``[batch, kv_heads, tokens, head_dim]`` that are read as they are, in place of a store."""

    states: Tensor
    sink_tokens: ClassVar[int] = 0
    body: ClassVar[tuple[()]] = ()

    @property
    def batch(self) -> int:
        """Batch rows."""
        return self.states.shape[0]

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.states.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.states.shape[3]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the tiles."""
        return self.states.dtype

    def spans(self, tile_tokens: int) -> Iterator[tuple[int, int]]:
        """Yield ``(start, stop)`` of at most `tile_tokens` tokens at a time."""
        tokens = self.states.shape[2]
        for start in range(0, tokens, tile_tokens):
            yield start, min(start + tile_tokens, tokens)

    def tile(self, start: int, stop: int) -> Tensor:
        """Return tokens `start` to `stop`."""
        return self.states[:, :, start:stop]


def attend(
    query: Tensor,
    keys: Store | Exact,
    values: Store | Exact,
    mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Return ``softmax(query @ keys^T * scale + mask) @ values`` without ever holding keys or values whole.

    Args:
        query: ``[batch, query_heads, query_tokens, head_dim]``; query head ``h`` reads key/value head
            ``h // (query_heads / kv_heads)``.
        keys, values: stores, or exact states, of the same length; their head dims may differ.
        mask: broadcastable to ``[batch, query_heads, query_tokens, tokens]``; bool (True: attend) or additive.
        is_causal: query token ``i`` sees tokens 0 to ``i``, as `torch.nn.functional.scaled_dot_product_attention`
            means it.
        scale: factor on the scores; None takes ``head_dim ** -0.5``.
        softcap: what scores are soft-capped at before the mask is added, see `parts.soft_capped`.
        sinks: scores ``[query_heads]`` of a token more, which every query sees and which has a value of zero.
        kernel: what attends over the bodies of stores, in place of tiles; sink and window are always done here.

    Returns:
        ``[batch, query_heads, query_tokens, value_head_dim]`` in the dtype of `query`. A query that may see nothing
        gets zeros, as in torch.
    """
    out = query.new_empty((*query.shape[:3], values.head_dim))
    for first in range(0, query.shape[2], QUERY_TOKENS):
        last = min(first + QUERY_TOKENS, query.shape[2])
        rows = mask if mask is None or mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., first:last, :]
        position = first if is_causal else None
        out[:, :, first:last] = _attend(
            query[:, :, first:last], keys, values, rows, position, scale, softcap, sinks, kernel
        )
    return out


def _attend(
    query: Tensor,
    keys: Store | Exact,
    values: Store | Exact,
    mask: Tensor | None,
    position: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    kernel: Kernel | None,
) -> Tensor:
    """Attend for a few query tokens; if causal, the first of them sees the tokens up to `position`."""
    batch, query_heads, queries, head_dim = query.shape
    groups = query_heads // keys.kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    shape = (batch, keys.kv_heads, groups, queries)
    # Scores and sums in float32 at least: in float16 a large score would overflow.
    exact = torch.promote_types(keys.compute_dtype, torch.float32)
    folded = (query.to(exact) * scale).reshape(batch, keys.kv_heads, groups * queries, head_dim)
    masked = None if mask is None else _grouped_mask(mask, shape)
    seen = None if position is None else torch.arange(position, position + queries, device=query.device)[:, None]

    running = Running(shape, values.head_dim, exact, query.device)
    if sinks is not None:
        running.add_sinks(sinks.reshape(1, keys.kv_heads, groups, 1, 1))
    body = range(0)
    if isinstance(keys, Store) and isinstance(values, Store) and quantised_together(keys, values):
        body = range(keys.sink_tokens, keys.sink_tokens + len(keys.body))
        if body:
            for one in (keys.body, values.body):
                one.fetch()
            part = None if masked is None else _tokens_of(masked, body.start, body.stop)
            last = None if seen is None else seen - body.start
            running.merge(_attend_body(kernel, folded, keys.body, values.body, part, last, softcap))
    for start, stop in keys.spans(tile_tokens(keys, values, query_heads * queries)):
        if start in body:
            continue
        if position is not None and start >= position + queries:
            break  # causality hides this tile and all behind it
        scores = _scores(folded, keys.tile(start, stop).to(exact), shape, softcap)
        running.add(
            _hidden(scores, masked, seen, start, stop),
            values.tile(start, stop).to(exact),
        )
    return running.result().reshape(batch, query_heads, queries, values.head_dim).to(query.dtype)


def quantised_together(keys: Store, values: Store) -> bool:
    """Whether the same tokens are quantised in both."""
    return (keys.sink_tokens, len(keys.body)) == (values.sink_tokens, len(values.body))


def _attend_body(
    kernel: Kernel | None,
    query: Tensor,
    keys: Body,
    values: Body,
    mask: Tensor | None,
    last: Tensor | None,
    softcap: float | None,
) -> Part:
    """Have a kernel, or tiles, attend in the frames of keys and values: the query goes there, the result comes back."""
    asked, shift = keys.frame.query(query)
    if kernel is None:
        part = attend_tiles(asked, keys, values, mask, last, softcap, shift)
    else:
        # A cap takes whole scores. Without one, what is added to all of a query's scores is added to the largest.
        part = kernel(asked, keys, values, mask, last, softcap, None if softcap is None else shift)
        if shift is not None and softcap is None:
            part = replace(part, highest=part.highest + shift)
        if keys.encoder.kept:
            return with_outliers(part, Asked(query, asked, shift, mask, last, softcap), keys, values)
    return replace(part, mixed=values.frame.mixture(part.mixed, part.total))


def attend_tiles(
    query: Tensor,
    keys: Body,
    values: Body,
    mask: Tensor | None,
    last: Tensor | None,
    softcap: float | None = None,
    shift: Tensor | None = None,
) -> Part:
    """Attend over bodies tile by tile, dequantised in their frames; for every format.

    Arguments and result are those of a `parts.Kernel`, but that no token is left out, and that `shift` is added without
    a cap too.
    """
    batch, kv_heads, rows, _ = query.shape
    queries = query_tokens(rows, mask, last)
    shape = (batch, kv_heads, rows // queries, queries)
    running: Running | None = None
    numbers = batch * kv_heads * max(keys.head_dim, values.head_dim, rows)
    for start, stop in keys.spans(_fitting_tokens(numbers)):
        keys_tile, values_tile = (
            body.tile(start, stop, body.encoder.dtype, framed=True).to(query.device, query.dtype)
            for body in (keys, values)
        )
        scores = _hidden(_scores(query, keys_tile, shape, softcap, shift), mask, last, start, stop)
        running = running or Running(shape, values.head_dim, query.dtype, query.device)
        running.add(scores, values_tile)
    if running is None:
        raise ValueError("nothing is quantised")
    return running.part()


def _scores(
    query: Tensor, keys: Tensor, shape: tuple[int, int, int, int], softcap: float | None, shift: Tensor | None = None
) -> Tensor:
    scores = query @ keys.transpose(-1, -2)
    if shift is not None:
        scores += shift.unsqueeze(-1)
    return soft_capped(scores.reshape(*shape, keys.shape[2]), softcap)


def _hidden(scores: Tensor, mask: Tensor | None, last: Tensor | None, start: int, stop: int) -> Tensor:
    """Return scores of tokens `start` to `stop` with the mask applied, and -inf behind the `last` token to be seen."""
    if mask is not None:
        scores = apply_mask(scores, _tokens_of(mask, start, stop))
    if last is not None:
        scores = scores.masked_fill(torch.arange(start, stop, device=scores.device) > last, -torch.inf)
    return scores


def tile_tokens(keys: Store | Exact, values: Store | Exact, queries: int) -> int:
    """Return how many tokens a tile may have.

    Args:
        keys, values: the stores.
        queries: query heads times query tokens, of one batch row.
    """
    return _fitting_tokens(keys.batch * max(keys.kv_heads * max(keys.head_dim, values.head_dim), queries))


def _fitting_tokens(numbers: int) -> int:
    """Return how many tokens a tile may have of which each takes so many numbers."""
    return max(_FEWEST_TOKENS, TILE_ELEMENTS // max(1, numbers) // _FEWEST_TOKENS * _FEWEST_TOKENS)


def _grouped_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Return a mask as ``[batch or 1, kv_heads or 1, groups or 1, queries or 1, tokens or 1]``."""
    mask = mask[(None,) * (4 - mask.dim())]
    return mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, shape[1:3])


def _tokens_of(mask: Tensor, start: int, stop: int) -> Tensor:
    """Return the part of a mask that is about tokens `start` to `stop`."""
    return mask if mask.shape[-1] == 1 else mask[..., start:stop]

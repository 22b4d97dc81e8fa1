"""Attention to outlier tokens, which kernels leave out: their states are exact in one of the two streams, or in both.

A token whose key is kept is scored with that, and one whose value is kept brings that. What the other stream has of it
is dequantised, or exact if it is kept there too. Nothing is taken back from what a kernel has summed, so no digit is
lost where a token had a large score by mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvquant.attention.parts import Part, Running, Segment, apply_mask, query_tokens, segments, soft_capped
from kvquant.engine.body import Body
from kvquant.engine.pages import CanonicalPage

#: Numbers that the states of outlier tokens, or their scores, may have at once: 4 MiB in float32.
TILE_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of two bodies, see `parts.Kernel`.

    Attributes:
        query: ``[batch, kv_heads, groups * query_tokens, head_dim]``.
        framed: the same, in the frame of the keys.
        shift: what is added to its scores there, ``[batch, kv_heads, rows]``; None for nothing.
        mask, last, softcap: as a kernel is given them.
    """

    query: Tensor
    framed: Tensor
    shift: Tensor | None
    mask: Tensor | None
    last: Tensor | None
    softcap: float | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch rows, key/value heads, query heads of each, query tokens."""
        batch, heads, rows, _ = self.query.shape
        queries = query_tokens(rows, self.mask, self.last)
        return batch, heads, rows // queries, queries


@dataclass(frozen=True, eq=False)
class _Kept:
    """Outlier tokens of a few blocks of one page.

    Attributes:
        page: the page.
        offset: the token of the body that would be the first of the page.
        tokens: int64 ``[batch, kv_heads, blocks, kept]``, counted from the first of the body.
        states: as they were given, ``[batch, kv_heads, blocks * kept, head_dim]``.
    """

    page: CanonicalPage
    offset: int
    tokens: Tensor
    states: Tensor


def with_outliers(part: Part, asked: Asked, keys: Body, values: Body) -> Part:
    """Add the outlier tokens of both bodies to what a kernel made of all others.

    Args:
        part: the kernel's, of values in their frame.
        asked: what the kernel was asked.
        keys, values: the bodies, of canonical formats, which keep as many tokens of each block.

    Returns:
        The part of all tokens, of values as they were given.
    """
    shape, dtype, device = asked.shape, asked.query.dtype, asked.query.device
    # Dequantised values come in their frame, exact ones as they are: they are summed apart.
    framed, plain = (Running(shape, values.head_dim, dtype, device) for _ in range(2))
    framed.merge(part)
    for segment in segments(keys, values):
        for kept_keys, kept_values in _kept(segment, asked.query):
            _add(framed, plain, asked, segment, kept_keys, kept_values)
    read = framed.part()
    plain.merge(replace(read, mixed=values.frame.mixture(read.mixed, read.total)))
    return plain.part()


def _kept(segment: Segment, query: Tensor) -> Iterator[tuple[_Kept, _Kept]]:
    """Yield the outlier tokens of the keys and of the values of a segment, those of the same few blocks together."""
    keys, values = segment.keys.outliers, segment.values.outliers
    if keys is None or values is None:
        return
    block, widest = keys.block, max(query.shape[2], segment.keys.head_dim, segment.values.head_dim)
    step = max(1, TILE_ELEMENTS // max(1, query.shape[:2].numel() * keys.kept * widest))
    # Blocks of both streams begin at the same tokens, wherever their pages begin.
    first, end = segment.key_start // block, -(-(segment.key_start + segment.stop - segment.start) // block)
    ahead = segment.value_start // block - first
    for low in range(first, end, step):
        high = min(low + step, end)
        sides = (
            (segment.keys, keys.blocks(low, high), segment.key_start, low),
            (segment.values, values.blocks(low + ahead, high + ahead), segment.value_start, low + ahead),
        )
        kept_keys, kept_values = (
            _Kept(
                page,
                segment.start - page_start,
                outliers.positions + _starts(segment.start - page_start, at, high - low, block, query.device),
                outliers.states.flatten(2, 3).to(query.dtype),
            )
            for page, outliers, page_start, at in sides
        )
        yield kept_keys, kept_values


def _starts(offset: int, first: int, blocks: int, block: int, device: torch.device) -> Tensor:
    """Return the first tokens of `blocks` blocks from block `first` on, int64 ``[blocks, 1]``."""
    return torch.arange(first, first + blocks, device=device).mul_(block).add_(offset).unsqueeze(1)


def _add(framed: Running, plain: Running, asked: Asked, segment: Segment, keys: _Kept, values: _Kept) -> None:
    """Add the outlier tokens of a few blocks: those whose values are exact to `plain`, the others to `framed`."""
    same = keys.tokens.unsqueeze(-1) == values.tokens.unsqueeze(-2)  # [batch, kv_heads, blocks, of keys, of values]
    in_values, in_keys = same.any(-1).flatten(2), same.any(-2).flatten(2)
    exact = asked.query @ keys.states.transpose(-1, -2)
    read = asked.framed @ _dequantized(keys, values.tokens, segment, asked.query.dtype).transpose(-1, -2)
    if asked.shift is not None:
        read += asked.shift.unsqueeze(-1)
    # The score of a token that is kept in both: that of the exact key.
    blocks, kept = keys.tokens.shape[2:]
    place = same.int().argmax(-2) + torch.arange(blocks, device=same.device).mul_(kept).unsqueeze(1)
    both = exact.gather(3, place.flatten(2).unsqueeze(2).expand_as(read))
    scores = torch.where(in_keys.unsqueeze(2), both, read)
    dequantized = _dequantized(values, keys.tokens, segment, asked.query.dtype)
    framed.add(_shown(exact, asked, segment, keys.tokens.flatten(2), in_values), dequantized)
    plain.add(_shown(scores, asked, segment, values.tokens.flatten(2), None), values.states)


def _dequantized(kept: _Kept, tokens: Tensor, segment: Segment, dtype: torch.dtype) -> Tensor:
    """Return what codes say of tokens of the body, those of the segment: ``[batch, kv_heads, n, head_dim]``."""
    return kept.page.dequantize_each(tokens.flatten(2).clamp(segment.start, segment.stop - 1) - kept.offset, dtype)


def _shown(scores: Tensor, asked: Asked, segment: Segment, tokens: Tensor, other: Tensor | None) -> Tensor:
    """Return scores as `Running.add` takes them, soft-capped and masked.

    Args:
        scores: ``[batch, kv_heads, rows, n]``.
        asked: cap, mask and limit.
        segment: the tokens that there are; blocks may reach beyond.
        tokens: ``[batch, kv_heads, n]``, what is scored.
        other: bool, like `tokens`: what is to be left out; None for nothing.
    """
    scores = soft_capped(scores.reshape(*asked.shape, -1), asked.softcap)
    hidden = (tokens < segment.start) | (tokens >= segment.stop)
    hidden = (hidden if other is None else hidden | other)[:, :, None, None]
    where = tokens[:, :, None, None]
    if asked.mask is not None:
        mask = asked.mask
        if mask.shape[-1] > 1:
            index = where.clamp(segment.start, segment.stop - 1)
            mask = mask.expand(*index.shape[:2], *mask.shape[2:]).gather(4, index.expand(-1, -1, *mask.shape[2:4], -1))
        scores = apply_mask(scores, mask)
    if asked.last is not None:
        hidden = hidden | (where > asked.last)
    return scores.masked_fill(hidden, -torch.inf)

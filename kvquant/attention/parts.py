"""Parts of an attention, and how they become one.

A softmax over many tokens can be taken part by part: what is kept of a part is the largest score, the sum of the
exponentials, and the values mixed with them, all relative to that score (online softmax, Milakov and Gimelshein,
arXiv 1805.02867; the same merge as in flash attention, Dao et al., arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvquant.engine.body import Body
from kvquant.engine.pages import CanonicalPage


@dataclass(frozen=True, eq=False)
class Part:
    """Attention over some of the tokens, for ``rows = groups * query_tokens`` queries of each key/value head.

    Attributes:
        highest: the largest score, ``[batch, kv_heads, rows]``; -inf where no token may be seen.
        total: sum of ``exp(score - highest)``, ``[batch, kv_heads, rows]``; 0 where no token may be seen.
        mixed: sum of ``exp(score - highest) * value``, ``[batch, kv_heads, rows, value_head_dim]``.
    """

    highest: Tensor
    total: Tensor
    mixed: Tensor


class Kernel(Protocol):
    """Attends over the quantised tokens of a layer without writing them to memory dequantised."""

    def __call__(
        self,
        query: Tensor,
        keys: Body,
        values: Body,
        mask: Tensor | None,
        last: Tensor | None,
        softcap: float | None = None,
        shift: Tensor | None = None,
    ) -> Part:
        """Attend over `keys` and `values`, without the tokens that either has among its outliers.

        Args:
            query: float32 ``[batch, kv_heads, groups * query_tokens, head_dim]``, multiplied by the softmax scale.
            keys, values: bodies of the same length, on the device of `query`, of canonical formats.
            mask: bool or floating, ``[batch or 1, kv_heads or 1, groups or 1, query_tokens or 1, len(keys) or 1]``.
            last: int64 ``[query_tokens, 1]``, the last token of the body that each query token may see, below zero
                for none; None if all may be seen.
            softcap: what scores are soft-capped at, before the mask, None for no cap; see `soft_capped`.
            shift: float32 ``[batch, kv_heads, groups * query_tokens]``, what is added to each query's scores before
                the cap, only where there is one; None for nothing.
        """
        ...  # an interface


def soft_capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Return ``softcap * tanh(scores / softcap)``, or `scores` where there is no cap (Gemma 2, arXiv 2408.00118)."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def apply_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """Apply a mask to scores ``[batch, kv_heads, groups, queries, tokens]``, to which it is broadcast."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.to(scores.dtype)


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens that lie in one page of keys and in one page of values.

    Attributes:
        start, stop: the tokens, counted from the first of the body.
        keys, values: the pages.
        key_start, value_start: where in its page the first token is.
    """

    start: int
    stop: int
    keys: CanonicalPage
    key_start: int
    values: CanonicalPage
    value_start: int


def query_tokens(rows: int, mask: Tensor | None, last: Tensor | None) -> int:
    """Return the query tokens among a kernel's `rows`, 1 where neither mask nor limit tells them apart, nor groups."""
    if last is not None:
        return last.shape[0]
    if mask is None:
        return 1
    return mask.shape[3] if mask.shape[3] > 1 else rows // mask.shape[2]


def segments(keys: Body, values: Body) -> Iterator[Segment]:
    """Yield the segments of two bodies of the same length and of canonical formats, in order of tokens."""
    key_pages, value_pages = list(_located(keys)), list(_located(values))
    at = start = 0  # tokens that are out of view lie before it
    for first, page in key_pages:
        while start < first + page.length:
            while value_pages[at][0] + value_pages[at][1].length <= start:
                at += 1
            value_first, value_page = value_pages[at]
            stop = min(first + page.length, value_first + value_page.length)
            yield Segment(start, stop, page, start - first, value_page, start - value_first)
            start = stop


def _located(body: Body) -> Iterator[tuple[int, CanonicalPage]]:
    first = -body.hidden
    for page in body.near:
        if not isinstance(page, CanonicalPage):
            raise TypeError("only pages of a canonical format can be read without their backend")
        yield first, page
        first += page.length


class Running:
    """An attention that parts are added to."""

    def __init__(
        self, shape: tuple[int, int, int, int], value_head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Begin with nothing; `shape` is ``(batch, kv_heads, groups, query_tokens)``."""
        self._shape, self._channels = shape, value_head_dim
        self._made: dict[str, Any] = {"dtype": dtype, "device": device}
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None  # highest, total, mixed, as in a part

    def add_sinks(self, scores: Tensor) -> None:
        """Add attention sinks: scores that take their share of the softmax and bring no value.

        (Xiao et al., arXiv 2309.17453; learned ones as in gpt-oss, arXiv 2508.10925.)

        Args:
            scores: ``[batch or 1, kv_heads, groups, 1, 1]``.
        """
        highest = scores.to(**self._made).expand(*self._shape, 1)
        self._absorb(highest, torch.ones_like(highest), highest.new_zeros((*self._shape, self._channels)))

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Add tokens with these scores.

        Args:
            scores: ``[batch, kv_heads, groups, query_tokens, tokens]``; -inf where a token may not be seen.
            values: ``[batch, kv_heads, tokens, value_head_dim]``.
        """
        highest = scores.amax(-1, keepdim=True)
        weights = (scores - _reference(highest)).exp_()
        mixed = weights.flatten(2, 3) @ values
        self._absorb(highest, weights.sum(-1, keepdim=True), mixed.reshape(*self._shape, self._channels))

    def merge(self, part: Part) -> None:
        """Add a part."""
        shape = (*self._shape, 1)
        mixed = part.mixed.reshape(*self._shape, self._channels)
        self._absorb(part.highest.reshape(shape), part.total.reshape(shape), mixed)

    def _absorb(self, highest: Tensor, total: Tensor, mixed: Tensor) -> None:
        if self._sums is None:
            self._sums = highest.to(**self._made), total.to(**self._made), mixed.to(**self._made)
            return
        before, held, sums = self._sums
        raised = torch.maximum(before, highest)
        reference = _reference(raised)
        kept, added = (before - reference).exp_(), (highest - reference).exp_()
        self._sums = raised, held * kept + total * added, sums * kept + mixed * added

    def part(self) -> Part:
        """Return all that was added as one part."""
        batch, kv_heads, groups, queries = self._shape
        highest, total, mixed = self._all()
        rows = (batch, kv_heads, groups * queries)
        return Part(highest.reshape(rows), total.reshape(rows), mixed.reshape(*rows, self._channels))

    def result(self) -> Tensor:
        """Return the attention, ``[batch, kv_heads, groups, query_tokens, value_head_dim]``; zeros of nothing seen."""
        _, total, mixed = self._all()
        return mixed / total.masked_fill(total == 0, 1.0)

    def _all(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._sums is not None:
            return self._sums
        highest = torch.full((*self._shape, 1), -torch.inf, **self._made)
        return highest, torch.zeros_like(highest), highest.new_zeros((*self._shape, self._channels))


def _reference(highest: Tensor) -> Tensor:
    """Return what scores are taken relative to; where nothing may be seen, -inf - -inf would be NaN."""
    return highest.masked_fill(highest == -torch.inf, 0.0)

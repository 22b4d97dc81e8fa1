"""The body: quantised tokens in pages, appended in two steps so that a failure in between changes nothing."""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvquant.engine.encode import Encoder
from kvquant.engine.offload import Copies, Home, clone, host_for
from kvquant.engine.opaque import OpaquePage
from kvquant.engine.pages import CanonicalPage, Page
from kvquant.engine.pieces import Encoded, Piece
from kvquant.engine.state import Saved, State
from kvquant.engine.window import WindowPolicy
from kvquant.transforms.frame import Frame
from kvquant.transforms.smoothing import Smoothing


@dataclass
class Staged:
    """Tokens written behind the valid ones; they count once `Body.commit` has set the lengths.

    Attributes:
        lengths: pages written to, and the length each will have.
        tokens: how many tokens there are in all.
        smoothing: of the body's channels, from these tokens on.
    """

    lengths: list[tuple[Page, int]] = field(default_factory=list)
    tokens: int = 0
    smoothing: Smoothing | None = None


class Body:
    """Quantised tokens of one stream.

    Attributes:
        encoder: what quantises its tokens.
        device: where it is read.
        home: where it lies: there, or in host memory, from where `fetch` brings copies of its pages.
        kv_heads, head_dim: of the states.
        pages: the tokens, in order.
        hidden: how many of the oldest are out of view. They are not counted, read or attended to, and lie in memory
            until all of their page are: a group can only be let go whole.
        first_token: position in the sequence of the first token held.
        smoothing: of its channels, found in its first block; None while it is empty, or where none is wanted.

    Spare capacity is at most one page or an eighth of what is stored: a new page takes what is at hand, and at least
    an eighth of the length so far. So the number of pages grows with the logarithm of the length, nothing is ever
    copied to make room, and appending n tokens costs O(n).
    """

    def __init__(
        self, encoder: Encoder, policy: WindowPolicy, like: Tensor, device: torch.device, *, offload: bool = False
    ) -> None:
        """Make an empty body.

        Args:
            encoder: what quantises its tokens.
            policy: gives the position of its first token and the size of its smallest page.
            like: ``[batch, kv_heads, any, head_dim]``, gives heads and channels.
            device: where it is read.
            offload: whether it lies in host memory.
        """
        self.encoder, self.device = encoder, device
        self.home = host_for(device) if offload else Home(device)
        self._copies = Copies(device)
        self.pages: list[Page] = []
        self.hidden = 0
        self.first_token = policy.sink_length
        self.smoothing: Smoothing | None = None
        self._starts = [0]
        self._policy = policy
        self.kv_heads, self.head_dim, self._dtype = like.shape[1], like.shape[3], like.dtype

    def __len__(self) -> int:
        return self._starts[-1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Body:
        body = copy.copy(self)
        memo[id(self)] = body
        body.pages, body._copies = [page.mapped(clone) for page in self.pages], Copies(self.device)
        return body

    @property
    def held(self) -> int:
        """Tokens held, hidden ones too."""
        return self.hidden + len(self)

    def _index(self) -> None:
        """Note where each page starts, below zero where tokens are hidden, and the length behind the last."""
        lengths = (page.length for page in self.pages)
        self._starts = list(itertools.accumulate(lengths, initial=-self.hidden))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each page that are in view."""
        return [max(0, stop) - max(0, start) for start, stop in itertools.pairwise(self._starts)]

    def hide(self, tokens: int) -> None:
        """Hide the oldest `tokens` tokens held; those that were hidden before and are not of them come back."""
        self.hidden = tokens
        self._index()

    def free(self) -> int:
        """Let pages go that are hidden whole, and return how many tokens they had."""
        freed = 0
        while self.pages and self.pages[0].length <= self.hidden:
            self._copies.forget(self.pages[:1])
            freed += self.pages[0].length
            self.hidden -= self.pages.pop(0).length
        self.first_token += freed
        self._index()
        return freed

    @property
    def scale_bits(self) -> int:
        """Bits that scales have at least from here on, see `Encoder.encode`."""
        return self.pages[-1].scale_bits if self.pages else 0

    @property
    def frame(self) -> Frame:
        """The frame in which its tokens are quantised."""
        return Frame(self.smoothing, self.encoder.transform)

    def smoothing_for(self, block: Tensor) -> Smoothing | None:
        """Return how the next tokens are smoothed.

        Args:
            block: the first of them, ``[batch, kv_heads, tokens, head_dim]``.
        """
        if self.smoothing is None and self.encoder.smooths:
            return Smoothing.fit(block).to(self.device)
        return self.smoothing

    def stage(self, pieces: Iterator[Piece], tokens: int, smoothing: Smoothing | None = None) -> Staged:
        """Write pieces behind the valid tokens without making them count.

        Args:
            pieces: what to write, produced as it is consumed so that only one chunk is alive at a time.
            tokens: how many tokens they have together.
            smoothing: what `smoothing_for` said of them.
        """
        staged = Staged(smoothing=smoothing)
        stored = self.held
        page = self.pages[-1] if self.pages else None
        at = page.length if page else 0
        for piece in pieces:
            start = 0
            while start < piece.tokens:
                if page is None or not page.accepts(piece, at):
                    if page is not None:
                        page.trim(at)  # nothing will be written behind its end again
                    left = tokens - staged.tokens
                    page, at = self._new_page(piece, stored + staged.tokens, left), 0
                written = page.write(piece, start, at)
                at, start, staged.tokens = at + written, start + written, staged.tokens + written
                if staged.lengths and staged.lengths[-1][0] is page:
                    staged.lengths.pop()
                staged.lengths.append((page, at))
        return staged

    def commit(self, staged: Staged) -> None:
        """Make staged tokens count."""
        if staged.tokens:
            self.smoothing = staged.smoothing
        self._copies.forget(page for page, _ in staged.lengths)
        for page, length in staged.lengths:
            if not any(page is known for known in self.pages):
                self.pages.append(page)
            page.length = length
        self._index()

    def discard(self) -> None:
        """Forget what was staged and will not be committed."""
        for page in self.pages[-1:]:
            page.discard()

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens. A page that ends inside a group is never written to again."""
        self._copies.forget()
        tokens += self.hidden
        before = 0
        for index, page in enumerate(self.pages):
            if before + page.length >= tokens:
                page.length = tokens - before
                del self.pages[index + (page.length > 0) :]
                break
            before += page.length
        for page in self.pages[-1:]:
            page.discard()
            if page.capacity - page.length > self._policy.spare(tokens):
                page.trim(page.length)
        self._index()

    def without(self, tokens: int) -> Body:
        """Return a body that lacks the newest `tokens` tokens, to be read; this one is as it was."""
        self.fetch()
        body, left = copy.copy(self), self.held - tokens
        body.pages, body.home = [], Home(self.device)
        for page in self.near:
            kept = min(page.length, left)
            if not kept:
                break
            body.pages.append(page if kept == page.length else copy.copy(page))
            body.pages[-1].length = kept
            left -= kept
        body._index()
        return body

    def replaced(self, states: Tensor) -> Body:
        """Return a body of other states ``[batch, kv_heads, len(self), head_dim]``, in pages of the same lengths."""
        body = self._empty(states)
        body.first_token, body.hidden = self.first_token, self.hidden
        body.smoothing = self.smoothing_for(states) if self.pages else None
        for page, start in zip(self.pages, self._starts[:-1], strict=True):
            # A page that a crop left ending inside a group is filled up with its own last token, which moves no
            # minimum or maximum, and cut back after; what is hidden of a page, likewise, with the first in view.
            tokens = states[:, :, max(0, start) : start + page.length]
            first, last = tokens[:, :, :1], tokens[:, :, -1:]
            before, missing = max(0, -start), -page.length % self.encoder.block
            filled = torch.cat(
                [first.expand(-1, -1, before, -1), tokens, last.expand(-1, -1, missing, -1)],
                dim=2,
            )
            fresh = self._empty(states)
            position = self.first_token + self.hidden + start
            pieces = self.encoder.encode(filled, position, body.frame, body.scale_bits)
            fresh.commit(fresh.stage(pieces, filled.shape[2]))
            fresh.truncate(page.length)
            fresh.pages[-1].trim(fresh.pages[-1].length)
            body.pages += fresh.pages
        body._index()
        return body

    def _empty(self, like: Tensor) -> Body:
        return Body(self.encoder, self._policy, like, self.device, offload=self.is_offloaded)

    # -------------------------------------------------------------------------------------------- reading

    def read(self, start: int, stop: int, dtype: torch.dtype, *, framed: bool = False) -> Iterator[Tensor]:
        """Yield tokens `start` to `stop` page by page, dequantised; in their frame if `framed`."""
        frame = self.frame
        pages = self.near
        for at in range(max(0, bisect.bisect_right(self._starts, start) - 1), len(pages)):
            before = self._starts[at]
            low, high = max(start - before, 0), min(stop - before, pages[at].length)
            if before >= stop:
                break
            if low < high:
                states = pages[at].dequantize(low, high, dtype)
                states = states if framed else frame.leave(states)
                yield pages[at].with_outliers(states, low, high, frame if framed else None)

    def spans(self, tile_tokens: int) -> Iterator[tuple[int, int]]:
        """Yield ``(start, stop)`` from the first token to the last, at most `tile_tokens` at a time, each in a page."""
        for start, stop in itertools.pairwise(self._starts):
            for low in range(max(0, start), stop, tile_tokens):
                yield low, min(low + tile_tokens, stop)

    def tile(self, start: int, stop: int, dtype: torch.dtype, *, framed: bool = False) -> Tensor:
        """Return tokens `start` to `stop`, dequantised; in the frame in which they were quantised if `framed`.

        Returns:
            ``[batch, kv_heads, stop - start, head_dim]``.
        """
        parts = list(self.read(start, stop, dtype, framed=framed))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    # -------------------------------------------------------------------------------------------- other changes

    def select(self, indices: Tensor) -> None:
        """Keep batch rows `indices`, in that order."""
        self._copies.forget()
        if self.smoothing is not None:
            self.smoothing = self.smoothing.select(indices.to(self.device))
        for page in self.pages:
            page.select(indices.to(self.home.device))

    def moved(self, device: torch.device, *, offload: bool) -> Body:
        """Return the same body, read on `device`; tensors that lie where they should are shared.

        Args:
            device: where it is read.
            offload: whether it lies in host memory.
        """
        body = copy.copy(self)
        body.device, body.home, body._copies = device, host_for(device) if offload else Home(device), Copies(device)
        body.pages = [page.mapped(body.home.keep, body.home) for page in self.pages]
        body.smoothing = None if self.smoothing is None else self.smoothing.to(device)
        return body

    # -------------------------------------------------------------------------------------------- host memory

    @property
    def is_offloaded(self) -> bool:
        """Whether it lies in host memory, away from the device that reads it."""
        return self.home.far

    def fetch(self) -> None:
        """Begin to bring copies of its pages to the device, of those that are not there yet."""
        if self.is_offloaded:
            self._copies.fetch(self.pages)

    def let_go(self) -> None:
        """Let go of all copies on the device."""
        self._copies.forget()

    @property
    def near(self) -> list[Page]:
        """What to read: the pages, in their copies on the device as far as they have been fetched."""
        return self._copies.instead_of(self.pages) if self.is_offloaded else self.pages

    # -------------------------------------------------------------------------------------------- written down

    def state(self) -> State:
        """Return what the body is, without its spare capacity."""
        state = State()
        state.put_all("pages", [page.state() for page in self.pages])
        if self.smoothing is not None:
            state.tensors.update(center=self.smoothing.center, spread=self.smoothing.spread)
        return state

    def restore(self, saved: Saved, batch: int) -> None:
        """Take on a saved state, in an empty body. Pages stay where they were read from, unless they have room left.

        Args:
            saved: the state.
            batch: batch rows of the states.

        Raises:
            MisfitError: it is not one of a body like this.
        """
        stored = 0
        parts = list(saved.parts("pages"))
        if parts and self.encoder.smooths:
            shape = (batch, self.kv_heads, 1, self.head_dim)
            center, spread = (saved.take(name, shape, ["float16"]) for name in ("center", "spread"))
            self.smoothing = Smoothing(center, spread).to(self.device)
        for part in parts:
            length = part.integer("length", 1)
            page: Page
            if self.encoder.border.is_opaque:
                page = self._opaque_page(stored)
                page.restore(part, length, batch, self._dtype)
            else:
                # Room behind a page that another has followed was given back.
                most = length + (self._policy.spare(stored + length) if part is parts[-1] else 0)
                whole = (batch, self.kv_heads, length, self.head_dim)
                capacity = part.integer("capacity", length, most)
                page = CanonicalPage.restored(self.encoder, part, whole, capacity, self._dtype)
                page = page.mapped(self.home.keep)
            self.pages.append(page)
            stored += page.length
        self._index()

    def parts(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield ``(part, tensor, valid bytes)`` of every tensor held."""
        for page in self.pages:
            yield from page.parts()
        if self.smoothing is not None:
            for tensor in (self.smoothing.center, self.smoothing.spread):
                yield "tables", tensor, tensor.nbytes
        for page in self._copies:
            yield from (("copies", tensor, tensor.nbytes) for _, tensor, _ in page.parts())

    def _new_page(self, piece: Piece, stored: int, left: int) -> Page:
        if not isinstance(piece, Encoded):
            return self._opaque_page(stored)
        capacity = self._policy.page_capacity(left, stored)
        return CanonicalPage(self.encoder, piece, capacity, self.head_dim, self.home)

    def _opaque_page(self, stored: int) -> OpaquePage:
        most = None if self._policy.span is None else self._policy.page_capacity(0, stored)
        first = self.first_token + stored
        return OpaquePage(self.encoder, first, self.kv_heads, self.head_dim, self.home, most)

"""A store: the keys, or the values, of one layer.

    | sink | body | window |

The sink and the window are exact. While nothing is quantised yet, the sink is simply the front of the window's
buffer, so that the states can be handed out as one tensor without a copy.

The oldest tokens may be out of view, in a layer of sliding-window attention. Then all that counts tokens counts from
the first in view, `seen` and what is said to be a position excepted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant.engine.body import Body, Staged
from kvquant.engine.buffer import Plan, TokenBuffer
from kvquant.engine.departed import Departed
from kvquant.engine.encode import Encoder
from kvquant.engine.offload import Place
from kvquant.engine.pieces import Encoded, Piece
from kvquant.engine.window import WindowPolicy
from kvquant.transforms.frame import Frame


@dataclass(frozen=True, eq=False)
class StagedUpdate:
    """What a store will be after an update: the parts of it that change."""

    body: Staged
    sink: Tensor | None
    recent: Plan
    departed: Departed | None


class Store:
    """One stream of one layer.

    Attributes:
        policy: what decides which tokens are quantised.
        place: where the body is to be.
        body: the quantised tokens.
        sink: ``[batch, kv_heads, sink_length, head_dim]``, or None while nothing is quantised; empty once all of it
            is out of view.
        recent: the tokens after the body (all tokens, while nothing is quantised).
        departed: what left the window with the last update, if that was to be remembered.
        version: rises with every change, so that what was handed out can tell that it is out of date.
    """

    def __init__(self, like: Tensor, encoder: Encoder, policy: WindowPolicy, place: Place) -> None:
        """Make an empty store for states like `like` ``[batch, kv_heads, any, head_dim]``."""
        self.policy = policy
        self.dtype, self.device = like.dtype, like.device
        self.compute_dtype = encoder.dtype
        self.version = 0
        self.sink: Tensor | None = None
        self._sink_hidden = 0
        self.departed: Departed | None = None
        self.place = place
        self.body = Body(encoder, policy, like, place.device or like.device, offload=place.offload)
        self.recent = TokenBuffer(like, policy.slack, policy.most_recent)

    # -------------------------------------------------------------------------------------------- shape

    @property
    def batch(self) -> int:
        """Batch rows."""
        return self.recent.data.shape[0]

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.recent.data.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.recent.data.shape[3]

    @property
    def sink_tokens(self) -> int:
        """Tokens of the sink that have been set apart from the window."""
        return 0 if self.sink is None else self.sink.shape[2] - self._sink_hidden

    def __len__(self) -> int:
        return self.sink_tokens + len(self.body) + len(self.recent)

    @property
    def hidden(self) -> int:
        """The oldest tokens that are held and out of view."""
        return self._sink_hidden + self.body.hidden

    @property
    def freed(self) -> int:
        """Tokens that are no longer held: the position of the first that is."""
        return self.seen - len(self) - self.hidden

    @property
    def seen(self) -> int:
        """Tokens of the sequence so far."""
        if self.sink is None:
            return len(self.recent)
        return self.body.first_token + self.body.held + len(self.recent)

    @property
    def in_front(self) -> int:
        """Sink tokens that are still to be set apart, the oldest in the buffer."""
        return self.policy.sink_length if self.sink is None else 0

    # -------------------------------------------------------------------------------------------- appending

    def leaving(self, added: int) -> int:
        """Return how many tokens will be quantised when `added` tokens are appended."""
        return self.policy.leaving(len(self.recent) + added - self.in_front)

    def stage(self, states: Tensor, leaving: int, *, record: bool = False) -> StagedUpdate:
        """Do the work of appending `states`: quantise what will leave the window, write the rest. Nothing counts yet.

        Args:
            states: ``[batch, kv_heads, tokens, head_dim]``, about to be appended.
            leaving: what `leaving` said.
            record: whether to remember what leaves, until the next update.
        """
        first = self.in_front if leaving else 0
        body = Staged()
        if leaving:
            position = self.body.first_token + self.body.held
            smoothing = self.body.smoothing_for(self._span(states, first, first + self.policy.block))
            frame = Frame(smoothing, self.body.encoder.transform)
            pieces = self._encode(states, first, first + leaving, position, frame)
            body = self.body.stage(pieces, leaving, smoothing)
        # Set the sink apart once quantised tokens will lie between it and the window.
        sink = self._span(states, 0, first).clone() if leaving and self.sink is None else self.sink
        dropped = first + leaving
        from_buffer = min(dropped, len(self.recent))
        departed = self._departing(states, leaving) if leaving and record else None
        recent = self.recent.plan(from_buffer, states[:, :, dropped - from_buffer :])
        return StagedUpdate(body, sink, recent, departed)

    def _departing(self, states: Tensor, leaving: int) -> Departed | None:
        """Return what leaves with the last of `states`, of as many as stay exact: no more are taken back together."""
        count = states.shape[2]
        recorded = min(count, self.policy.residual_length)
        before = self.leaving(count - recorded)
        steps = tuple(self.leaving(tokens) - before for tokens in range(count - recorded + 1, count + 1))
        if not steps or not steps[-1]:
            return None
        began, sink = self.sink is None and not before, 0 if before else self.in_front
        span = self._span(states, self.in_front - sink + before, self.in_front + leaving)
        return Departed(span.clone(), sink, began, steps)

    def commit(self, staged: StagedUpdate) -> None:
        """Make what was staged count: assignments only, so that this cannot fail half-way."""
        self.version += 1
        self.sink, self.departed = staged.sink, staged.departed
        self.recent.apply(staged.recent)
        self.body.commit(staged.body)

    def append(self, states: Tensor) -> None:
        """Stage and commit `states` at once."""
        self.commit(self.stage(states, self.leaving(states.shape[2])))

    def _encode(self, states: Tensor, start: int, stop: int, position: int, frame: Frame) -> Iterator[Piece]:
        """Encode tokens `start` to `stop` of the buffer followed by `states`, straight from where they lie.

        Whole blocks lie in the buffer alone or in `states` alone but for one that straddles both.
        """
        held, block = len(self.recent), self.policy.block
        inside = start + max(0, min(held, stop) - start) // block * block
        straddling = min(stop, inside + block) if inside < held else inside
        bits = self.body.scale_bits
        for low, high in ((start, inside), (inside, straddling), (straddling, stop)):
            if low < high:
                span = self._span(states, low, high)
                for piece in self.body.encoder.encode(span, position + low - start, frame, bits):
                    bits = 8 * piece.scale.element_size() if isinstance(piece, Encoded) else bits
                    yield piece

    def _span(self, states: Tensor, start: int, stop: int) -> Tensor:
        """Return tokens `start` to `stop` of the buffer followed by `states`."""
        held = len(self.recent)
        if stop <= held:
            return self.recent.view(start, stop)
        if start >= held:
            return states[:, :, start - held : stop - held]
        return torch.cat([self.recent.view(start, held), states[:, :, : stop - held]], dim=2)

    def discard(self) -> None:
        """Forget what was staged and will not be committed."""
        self.body.discard()

    # -------------------------------------------------------------------------------------------- reading

    def exact(self) -> Tensor | None:
        """Return all states as a view if nothing is quantised, else None."""
        return None if self.sink is not None else self.recent.view()

    def spans(self, tile_tokens: int) -> Iterator[tuple[int, int]]:
        """Yield ``(start, stop)`` from the first token to the last, at most `tile_tokens` at a time.

        A span lies in one page, or in the sink, or in the window, so that `tile` reads it without joining.
        """
        start = 0
        for length in (self.sink_tokens, *self.body.lengths, len(self.recent)):
            for low in range(0, length, tile_tokens):
                yield start + low, start + min(low + tile_tokens, length)
            start += length

    def tile(self, start: int, stop: int) -> Tensor:
        """Return tokens `start` to `stop` in `compute_dtype`.

        Returns:
            ``[batch, kv_heads, stop - start, head_dim]``, possibly a view of the store.
        """
        sink, recent = self.sink_tokens, self.sink_tokens + len(self.body)
        parts: list[Tensor] = []
        if start < sink:
            parts.append(self._exact(start, min(stop, sink)).to(self.compute_dtype))
        if start < recent and stop > sink:
            body = self.body.read(max(start - sink, 0), min(stop, recent) - sink, self.compute_dtype)
            parts += (states.to(self.device) for states in body)
        if stop > recent:
            parts.append(self._exact(max(start, recent), stop).to(self.compute_dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _exact(self, start: int, stop: int) -> Tensor:
        """Return tokens `start` to `stop`, which lie in the sink or in the window, as they were given."""
        if self.sink is not None and start < self.sink_tokens:
            return self.sink[:, :, self._sink_hidden + start : self._sink_hidden + stop]
        recent = self.sink_tokens + len(self.body)
        return self.recent.view(start - recent, stop - recent)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return tokens `start` to `stop` (all by default), dequantised, in the dtype of the states given.

        Returns:
            ``[batch, kv_heads, stop - start, head_dim]``, a tensor of its own.
        """
        stop = len(self) if stop is None else stop
        out = torch.empty(
            (self.batch, self.kv_heads, max(0, stop - start), self.head_dim), dtype=self.dtype, device=self.device
        )
        body = range(self.sink_tokens, self.sink_tokens + len(self.body))
        limits = torch.finfo(self.dtype)
        for low, high in self.spans(self.policy.page_tokens):
            first, last = max(start, low), min(stop, high)
            if first >= last:
                continue
            target = out[:, :, first - start : last - start]
            if first in body:
                states = self.tile(first, last)
                if torch.finfo(states.dtype).max > limits.max:
                    # Rounding may lead a little beyond what the narrower type can hold.
                    states = states.clamp(limits.min, limits.max)
                target.copy_(states)
            else:
                target.copy_(self._exact(first, last))
        return out

    # -------------------------------------------------------------------------------------------- out of view

    def begin_at(self, position: int) -> None:
        """Take tokens from `position` on as the first, in an empty store; those before are never seen."""
        self.sink = self.recent.view() if position else None
        self.body.first_token = position or self.policy.sink_length
        if not self.body.pages:
            self.body.smoothing = None

    def fit_smoothing(self, states: Tensor) -> None:
        """Find the smoothing where it would be found if all tokens were taken, in an empty store that skips some.

        Args:
            states: ``[batch, kv_heads, tokens, head_dim]``, from the first token of the sequence on.
        """
        first = self.policy.sink_length
        self.body.smoothing = self.body.smoothing_for(states[:, :, first : first + self.policy.block])

    def show_from(self, position: int, *, free: bool) -> None:
        """Have the first token in view be that at `position`, or the first held where that comes later.

        The window must be in view. What is in memory before it comes into view again if `position` says so.

        Args:
            position: in the sequence.
            free: whether to let go what is out of view then, as far as that can be done.
        """
        if self.sink is None:
            return
        hidden = max(0, position - self.freed)
        sink = self.sink.shape[2]
        if hidden != self.hidden:
            self.version += 1
            self._sink_hidden = min(hidden, sink)
            self.body.hide(hidden - self._sink_hidden)
        if free and self._sink_hidden == sink:
            if sink:
                self.sink, self._sink_hidden = self.sink[:, :, :0].clone(), 0
            self.body.free()

    # -------------------------------------------------------------------------------------------- other changes

    def crop(self, tokens: int) -> None:
        """Forget the newest `tokens` tokens. What remains is what was stored: nothing is quantised again.

        What left the window with those of the last update, and has been remembered, comes back exact.
        """
        self.version += 1
        if self.departed is not None and tokens:
            back, (self.departed, step) = self.departed, self.departed.without(tokens)
            if quantized := back.staying(step)[1]:
                self.body.truncate(len(self.body) - quantized)
                self._take_back(back, step, self.body)
        from_recent = min(tokens, len(self.recent))
        self.recent.drop_back(from_recent)
        from_body = min(tokens - from_recent, len(self.body))
        if from_body:
            self.body.truncate(len(self.body) - from_body)
        if self.sink is not None and not len(self.body):
            # Nothing is quantised any more: the sink goes back to the front of the buffer.
            kept = self.sink_tokens - (tokens - from_recent - from_body)
            self.recent.push_front(self.sink[:, :, :kept])
            self.begin_at(0)

    def select(self, indices: Tensor) -> None:
        """Keep batch rows `indices` (int64 ``[new_batch]``, repeats allowed), in that order."""
        self.version += 1
        self.departed = None if self.departed is None else self.departed.select(indices)
        if self.sink is not None:
            self.sink = self.sink.index_select(0, indices)
        self.body.select(indices)
        self.recent.select(indices)

    def _take_back(self, departed: Departed, step: int, body: Body) -> None:
        """Have those tokens in the window again that had not left it at a value of `departed.steps`.

        Args:
            departed: what left.
            step: the value.
            body: all other quantised tokens.
        """
        staying, _ = departed.staying(step)
        self.body = body
        self.recent.push_front(staying)
        if departed.began and not step:
            self.begin_at(0)

    def as_of(self, queries: int) -> Iterator[tuple[int, int, Store]]:
        """Yield ``(first, last, store)`` for runs of the last update's tokens: the store that each of them sees.

        Where what left the window was remembered, that is what each would have seen had they come one by one.

        Args:
            queries: query tokens; if they are fewer than those that are remembered, they are others.
        """
        if self.departed is None or queries < len(self.departed.steps):
            yield 0, queries, self
            return
        for first, last, step in self.departed.runs(queries):
            store = copy.copy(self)
            store.departed = None
            if quantized := self.departed.staying(step)[1]:
                store.recent = copy.copy(self.recent)
                store._take_back(self.departed, step, self.body.without(quantized))
            yield first, last, store

    def replaced(self, states: Tensor) -> Store:
        """Return a store that holds other states, of the same length, exact and quantised in the same places.

        Args:
            states: ``[batch, kv_heads, len(self), head_dim]``.
        """
        body = self.body
        store = Store(states, body.encoder, self.policy, self.place)
        if self.sink is not None:
            hidden = self.sink[:, :, : self._sink_hidden]
            store.sink = torch.cat([hidden, states[:, :, : self.sink_tokens]], dim=2)
            store._sink_hidden = self._sink_hidden
        end = self.sink_tokens + len(body)
        store.body = body.replaced(states[:, :, self.sink_tokens : end])
        store.recent.append(states[:, :, end:])
        return store

    def moved(self, device: torch.device) -> Store:
        """Return the same store for states on `device`; the body stays where it was told to be."""
        store, place = copy.copy(self), self.place
        store.device, store.departed = device, None  # what departed is of the last update alone
        store.sink = None if self.sink is None else self.sink.to(device)
        store.body = self.body.moved(place.device or device, offload=place.offload)
        store.recent = self.recent.moved(device)
        return store

    def offload(self) -> None:
        """Have the body lie in host memory from now on, unless it was told to be elsewhere."""
        self.place = Place(self.place.device, offload=self.place.device is None)
        self.body = self.body.moved(self.body.device, offload=self.place.offload)

    # -------------------------------------------------------------------------------------------- accounting

    def parts(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield ``(part, tensor, valid bytes)`` of every tensor held; parts are those of `memory.PARTS`."""
        if self.sink is not None:
            yield "sink", self.sink, self.sink.nbytes
        yield from self.body.parts()
        yield "window", self.recent.data, self.recent.view().nbytes
        if self.departed is not None:
            yield "window", self.departed.states, self.departed.states.nbytes

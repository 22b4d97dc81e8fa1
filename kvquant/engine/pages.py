"""Pages: where quantised tokens live. A page is written once, at its end, and never moves.

The body of a store is a list of pages. New pages are an eighth of what is stored (see `body`), so appending copies
nothing and spare capacity stays small. A crop may leave a page that ends inside a group; the next tokens then start
a new page, so a group never holds tokens that were quantised at different times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Protocol, cast

import torch
from torch import Tensor

from kvquant.engine.border import format_of
from kvquant.engine.encode import Encoder
from kvquant.engine.grouping import grouped, grouped_grid, scale_grid_shape, ungrouped
from kvquant.engine.offload import Home, clone, empty_like
from kvquant.engine.outliers import Outliers
from kvquant.engine.packing import packed_bytes, table_sizes, unpack
from kvquant.engine.pieces import Encoded, Piece
from kvquant.engine.scales import Levels, read_offset, read_scale
from kvquant.engine.state import Saved, Stack, State, dtype_name
from kvquant.engine.trellis import MOST_MEMORY, Taps, level_indices
from kvquant.transforms.frame import Frame

#: Bytes that an in-place selection may copy at once.
_SELECT_BYTES = 1 << 22


class Page(Protocol):
    """What the body needs of a page. `length` tokens of it are valid; it may hold staged ones behind them."""

    length: int

    @property
    def capacity(self) -> int:
        """Tokens that fit."""

    @property
    def scale_bits(self) -> int:
        """Bits of its scales, 0 where it has none."""

    def accepts(self, piece: Piece, at: int) -> bool:
        """Whether `piece` may be written behind token `at`: same layout, whole groups, room for one block."""

    def write(self, piece: Piece, start: int, at: int) -> int:
        """Write `piece` from its token `start` on at token `at`, as far as it fits; return the tokens written.

        They count once `length` says so.
        """

    def discard(self) -> None:
        """Forget tokens that were written and never counted."""

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return what codes say of tokens `start` to `stop`: ``[batch, kv_heads, stop - start, head_dim]``."""

    def with_outliers(self, states: Tensor, start: int, stop: int, frame: Frame | None) -> Tensor:
        """Return `states`, of tokens `start` to `stop`, written to: those of outlier tokens exact, see `outliers`.

        Args:
            states: ``[batch, kv_heads, stop - start, head_dim]``.
            start, stop: the tokens.
            frame: of the states, None for none.
        """

    def select(self, indices: Tensor) -> None:
        """Keep batch rows `indices`, in that order."""

    def trim(self, tokens: int) -> None:
        """Give back what lies behind the first `tokens` tokens."""

    def mapped(self, change: Callable[[Tensor], Tensor], home: Home | None = None) -> Page:
        """Return the same page with other tensors.

        Args:
            change: makes them, each of one of the page's; the numbers are the same.
            home: where the page lies then, if that is to be another place.
        """

    def parts(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield ``(part, tensor, valid bytes)`` of every tensor that the page holds."""

    def state(self) -> State:
        """Return what the page is, without its spare capacity."""


class CanonicalPage:
    """A page in a canonical format, affine, codebook or trellis: packed codes and a grid of scales.

    Attributes:
        scheme: axis and group size; its bits are those of the first half of the channels where `nbits` is mixed.
        nbits: bits of a code.
        head_dim: channels of a head.
        codes: uint8 ``[batch, kv_heads, capacity, packed_bytes]``.
        scale: the grid of scales of `capacity` tokens, as they are stored (see `scales`).
        offset: like `scale`, or None.
        table: in the encoder's widest type, what codes stand for (see `table_sizes`), or None where they are their own
            numbers (affine).
        taps: of the trellis, or None where there is none.
        outliers: tokens that have their states kept beside their codes, or None.
        length: valid tokens.
    """

    def __init__(self, encoder: Encoder, like: Encoded, capacity: int, head_dim: int, home: Home) -> None:
        """Allocate a page of `capacity` tokens with the layout of `like`."""
        self.scheme, self._block, self.head_dim = encoder.scheme, encoder.block, head_dim
        self.nbits = encoder.nbits
        self.length = 0
        batch, heads = like.codes.shape[:2]
        scales = capacity // self._tokens_per_scale
        self.codes = home.empty((batch, heads, capacity, like.codes.shape[3]), like.codes.dtype)
        self.scale = home.empty((batch, heads, scales, like.scale.shape[3]), like.scale.dtype)
        self.offset = None if like.offset is None else home.empty(self.scale.shape, like.scale.dtype)
        self.table = None if like.table is None else home.keep(like.table)
        self.taps = like.taps
        self.outliers = None if like.outliers is None else like.outliers.room(capacity, home)

    @property
    def _tokens_per_scale(self) -> int:
        return self.scheme.group_size if self.scheme.axis == "channel" else 1

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.codes.shape[2]

    @property
    def scale_bits(self) -> int:
        """Bits of its scales."""
        return 8 * self.scale.element_size()

    def accepts(self, piece: Piece, at: int) -> bool:
        """Whether `piece` may be written behind token `at`."""
        return (
            isinstance(piece, Encoded)
            and at % self._block == 0
            and at + self._block <= self.capacity
            and piece.scale.dtype == self.scale.dtype
            and (piece.table is None) == (self.table is None)
            and (piece.offset is None) == (self.offset is None)
            and piece.taps == self.taps
            and (piece.table is None or torch.equal(piece.table.to(self.codes.device), cast("Tensor", self.table)))
        )

    def write(self, piece: Piece, start: int, at: int) -> int:
        """Write `piece` from its token `start` on at token `at`, as far as it fits; return the tokens written."""
        source, per = cast("Encoded", piece), self._tokens_per_scale
        stop = min(source.tokens, start + self.capacity - at)
        self.codes[:, :, at : at + stop - start] = source.codes[:, :, start:stop]
        target = slice(at // per, (at + stop - start) // per)
        origin = slice(start // per, stop // per)
        self.scale[:, :, target] = source.scale[:, :, origin]
        if self.offset is not None and source.offset is not None:
            self.offset[:, :, target] = source.offset[:, :, origin]
        if self.outliers is not None and source.outliers is not None:
            self.outliers.write(source.outliers, start, stop, at)
        return stop - start

    def discard(self) -> None:
        """Forget tokens that were written and never counted: they lie in spare capacity."""

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return what codes say of tokens `start` to `stop`: ``[batch, kv_heads, stop - start, head_dim]``."""
        axis, group_size, per = self.scheme.axis, self.scheme.group_size, self._tokens_per_scale
        first, last = start // per, -(-stop // per)
        codes = self._codes(first * per, last * per)
        scale = read_scale(self.scale[:, :, first:last], dtype)
        numbers = codes.to(dtype) if self.table is None else self.table.to(dtype)[self._places(self._indices(codes))]
        states = grouped(numbers, axis, group_size).mul_(grouped_grid(scale, axis))
        if self.offset is not None:
            levels = Levels.of(self.nbits, self.table)
            states.add_(grouped_grid(read_offset(self.offset[:, :, first:last], scale, levels), axis))
        return ungrouped(states, axis)[:, :, start - first * per : stop - first * per]

    def with_outliers(self, states: Tensor, start: int, stop: int, frame: Frame | None) -> Tensor:
        """Return `states` with those of outlier tokens exact, see `Page`."""
        return states if self.outliers is None else self.outliers.over(states, start, stop, frame)

    def dequantize_each(self, at: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what the codes of single tokens stand for, of each batch row and head others.

        Args:
            at: int64 ``[batch, kv_heads, n]``, the tokens.
            dtype: of what is returned.

        Returns:
            ``[batch, kv_heads, n, head_dim]``.
        """
        rows, groups = at // self._tokens_per_scale, self.scale.shape[3]
        scale = read_scale(_picked(self.scale, rows), dtype)  # of each channel, or of each group of channels
        codes = self._codes_each(at)
        numbers = codes.to(dtype) if self.table is None else self.table.to(dtype)[self._places(codes)]
        states = numbers.unflatten(-1, (groups, -1)).mul_(scale.unsqueeze(-1))
        if self.offset is not None:
            levels = Levels.of(self.nbits, self.table)
            states = states.add_(read_offset(_picked(self.offset, rows), scale, levels).unsqueeze(-1))
        flat: Tensor = states.flatten(3)
        return flat

    def _codes_each(self, at: Tensor) -> Tensor:
        """Return the codes of single tokens, or which entries of the table they stand for, see `dequantize_each`."""
        if self.taps is None:
            return unpack(_picked(self.codes, at), self.nbits, self.head_dim)
        if self.scheme.axis == "token":
            codes = unpack(_picked(self.codes, at), self.nbits, self.head_dim)
            return level_indices(codes.unflatten(3, (-1, self.scheme.group_size)), self.taps, 4).flatten(3)
        # The tokens before in the same group, as far as the register reaches; zeros where the group begins.
        back = torch.arange(max(self.taps).bit_length() - 1, -1, -1, device=at.device)
        inside = (at % self.scheme.group_size).unsqueeze(-1) >= back
        past = (at.unsqueeze(-1) - back).clamp(min=0).flatten(2)
        codes = unpack(_picked(self.codes, past), self.nbits, self.head_dim)
        codes = codes.unflatten(2, inside.shape[2:]) * inside.unsqueeze(-1)
        return level_indices(codes, self.taps, 3)[:, :, :, -1]

    def _codes(self, start: int, stop: int) -> Tensor:
        """Return codes ``[batch, kv_heads, stop - start, head_dim]``; zeros behind the end of a page cut in a group."""
        codes = unpack(self.codes[:, :, start:stop], self.nbits, self.head_dim)
        missing = stop - start - codes.shape[2]
        return torch.nn.functional.pad(codes, (0, 0, 0, missing)) if missing else codes

    def _indices(self, codes: Tensor) -> Tensor:
        """Return which entries of their table codes stand for, which begin where a group does."""
        if self.taps is None:
            return codes
        axis = self.scheme.axis
        groups = grouped(codes, axis, self.scheme.group_size)
        return ungrouped(level_indices(groups, self.taps, 3 if axis == "channel" else 4), axis)

    def _places(self, indices: Tensor) -> Tensor:
        """Return the places in `table` of entries ``[..., head_dim]``: behind the first half's lie the second's."""
        places, (upper, *others) = indices.int(), table_sizes(self.nbits, self.taps)
        if others:
            places[..., self.head_dim // 2 :] += upper
        return places

    def select(self, indices: Tensor) -> None:
        """Keep batch rows `indices`, in that order."""
        self.codes, self.scale = _select(self.codes, indices), _select(self.scale, indices)
        self.offset = None if self.offset is None else _select(self.offset, indices)
        self.outliers = None if self.outliers is None else self.outliers.mapped(lambda one: _select(one, indices))

    def trim(self, tokens: int) -> None:
        """Give back what lies behind the first `tokens` tokens."""
        if tokens < self.capacity:
            scales = -(-tokens // self._tokens_per_scale)
            self.codes = clone(self.codes[:, :, :tokens])
            self.scale = clone(self.scale[:, :, :scales])
            self.offset = None if self.offset is None else clone(self.offset[:, :, :scales])
            self.outliers = None if self.outliers is None else self.outliers.trimmed(tokens)

    def mapped(self, change: Callable[[Tensor], Tensor], home: Home | None = None) -> CanonicalPage:  # noqa: ARG002
        """Return the same page with other tensors, see `Page`."""
        page = copy.copy(self)
        page.codes, page.scale = change(self.codes), change(self.scale)
        page.offset = None if self.offset is None else change(self.offset)
        page.table = None if self.table is None else change(self.table)
        page.outliers = None if self.outliers is None else self.outliers.mapped(change)
        return page

    def parts(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield ``(part, tensor, valid bytes)`` of every tensor that the page holds."""
        for part, tensor, per in (
            ("codes", self.codes, 1),
            ("scales", self.scale, self._tokens_per_scale),
            ("scales", self.offset, self._tokens_per_scale),
        ):
            if tensor is not None:
                rows = -(-self.length // per)
                yield part, tensor, tensor.nbytes * rows // max(1, tensor.shape[2])
        if self.table is not None:
            yield "tables", self.table, self.table.nbytes
        if self.outliers is not None:
            yield from self.outliers.parts(self.length)

    def state(self) -> State:
        """Return what the page is, without its spare capacity."""
        scales = -(-self.length // self._tokens_per_scale)
        tensors = {
            "codes": self.codes[:, :, : self.length],
            "scale": self.scale[:, :, :scales],
            "offset": None if self.offset is None else self.offset[:, :, :scales],
            "table": self.table,
            **({} if self.outliers is None else self.outliers.tensors(self.length)),
        }
        given: dict[str, Tensor | Stack] = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return State(given, {"length": self.length, "capacity": self.capacity, "taps": self.taps and list(self.taps)})

    @classmethod
    def restored(
        cls, encoder: Encoder, saved: Saved, shape: tuple[int, int, int, int], capacity: int, dtype: torch.dtype
    ) -> CanonicalPage:
        """Return a page in a saved state.

        Where it has no room left its tensors are those read; else they are copied into tensors that have the room, so
        that the next tokens are written where they would have been.

        Args:
            encoder: what quantised its tokens.
            saved: the state.
            shape: of its states, ``[batch, kv_heads, tokens, head_dim]``.
            capacity: tokens that it has room for.
            dtype: of the states.

        Raises:
            MisfitError: it is not one of a page like this.
        """
        page = cls.__new__(cls)
        page.scheme, page._block, page.head_dim, page.length = encoder.scheme, encoder.block, shape[3], shape[2]
        page.nbits, per = encoder.nbits, page._tokens_per_scale
        if capacity % page._block and capacity != page.length:
            raise saved.misfit(f"has room for {capacity} tokens, which are not whole blocks of {page._block}")
        scales = -(-page.length // per)
        grid = scale_grid_shape((*shape[:2], scales * per, shape[3]), encoder.scheme.axis, encoder.scheme.group_size)
        wide = dtype_name(encoder.border.wide_dtype)
        page.codes = saved.take("codes", (*shape[:3], packed_bytes(shape[3], page.nbits)), ["uint8"])
        page.scale = saved.take(
            "scale", grid, ["uint8", "float16", wide] if encoder.scale_bits == 8 else ["float16", wide]
        )
        page.taps = _taken_taps(saved)
        page.offset = saved.take("offset", grid, [dtype_name(page.scale.dtype)]) if saved.has("offset") else None
        entries = sum(table_sizes(page.nbits, page.taps))
        page.table = saved.take("table", (entries,), [wide]) if saved.has("table") else None
        kind = format_of(page.table, page.taps)
        if (page.offset is None) == (page.table is None) and kind != "trellis":
            raise saved.misfit("has neither offset nor table, or both")
        if kind not in encoder.formats:
            raise saved.misfit(f"is of the format {kind}, and the backend {encoder.backend!r} has {encoder.formats}")
        page.outliers = None
        if encoder.kept:
            page.outliers = Outliers.restored(saved, shape, dtype, page._block, encoder.kept).grown(capacity)
        page.codes = _with_room(page.codes, capacity)
        page.scale = _with_room(page.scale, -(-capacity // per))
        page.offset = None if page.offset is None else _with_room(page.offset, -(-capacity // per))
        return page


def _taken_taps(saved: Saved) -> Taps | None:
    """Return the taps of a saved page, if it has a trellis.

    Raises:
        MisfitError: they are none.
    """
    taps = saved.value("taps")
    if taps is None:
        return None
    pair = isinstance(taps, list) and len(taps) == 2 and all(type(tap) is int for tap in taps)
    if not pair or not all(0 < tap < 2 << MOST_MEMORY for tap in taps) or not saved.has("table"):
        raise saved.misfit(f"has a trellis with the taps {taps!r} that cannot be read")
    return Taps(*taps)


def _with_room(tensor: Tensor, tokens: int) -> Tensor:
    """Return a tensor with room for `tokens` along its third dimension, the same one if it has just that."""
    held = tensor.shape[2]
    if held == tokens:
        return tensor
    roomy = empty_like(tensor, (*tensor.shape[:2], tokens, tensor.shape[3]))
    roomy[:, :, :held] = tensor
    return roomy


def _picked(tensor: Tensor, at: Tensor) -> Tensor:
    """Return rows ``[batch, kv_heads, n, width]`` of a tensor ``[batch, kv_heads, tokens, width]``, those at `at`."""
    first = torch.arange(0, tensor.shape[:3].numel(), tensor.shape[2], device=at.device).reshape(*at.shape[:2], 1)
    return tensor.flatten(0, 2).index_select(0, (at + first).flatten()).reshape(*at.shape, tensor.shape[3])


def _select(tensor: Tensor, indices: Tensor) -> Tensor:
    """Select batch rows, in place and in bounded steps where the batch keeps its size (every step of a beam search)."""
    if len(indices) != tensor.shape[0]:
        return torch.index_select(tensor, 0, indices, out=empty_like(tensor, (len(indices), *tensor.shape[1:])))
    step = max(1, _SELECT_BYTES // max(1, tensor[:, :, :1].nbytes))
    for part in tensor.split(step, dim=2):
        part.copy_(part.index_select(0, indices))
    return tensor

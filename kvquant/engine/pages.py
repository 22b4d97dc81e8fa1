"""Pages: where quantised tokens live. A page is written once, at its end, and never moves.

The body of a store is a list of pages. New pages are an eighth of what is stored (see `body`), so appending copies
nothing and spare capacity stays small. A crop may leave a page that ends inside a group; the next tokens then start
a new page, so a group never holds tokens that were quantised at different times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import Tensor

from kvquant.engine.encode import Encoded, EncodedOpaque, Encoder, Piece
from kvquant.engine.grouping import grouped, grouped_grid, rows_to_states, ungrouped
from kvquant.engine.packing import unpack
from kvquant.errors import BackendContractError, QuantizationError
from kvquant.plugin.quantizer import Opaque

#: Bytes that an in-place selection may copy at once.
_SELECT_BYTES = 1 << 22


class Page(Protocol):
    """What the body needs of a page. `length` tokens of it are valid; it may hold staged ones behind them."""

    length: int

    @property
    def capacity(self) -> int:
        """Tokens that fit."""

    @property
    def wide(self) -> bool:
        """Whether its scales are wider than float16."""

    def accepts(self, piece: Piece, at: int) -> bool:
        """Whether `piece` may be written behind token `at`: same layout, whole groups, room for one block."""

    def write(self, piece: Piece, start: int, at: int) -> int:
        """Write `piece` from its token `start` on at token `at`, as far as it fits; return the tokens written.

        They count once `length` says so.
        """

    def discard(self) -> None:
        """Forget tokens that were written and never counted."""

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `start` to `stop` as ``[batch, kv_heads, stop - start, head_dim]``."""

    def select(self, indices: Tensor) -> None:
        """Keep batch rows `indices`, in that order."""

    def trim(self, tokens: int) -> None:
        """Give back what lies behind the first `tokens` tokens."""

    def to(self, device: torch.device) -> None:
        """Move to `device`."""

    def parts(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield ``(part, tensor, valid bytes)`` of every tensor that the page holds."""


class CanonicalPage:
    """A page in a canonical format, affine or codebook: packed codes and a grid of scales.

    Attributes:
        scheme: bits, axis and group size.
        head_dim: channels of a head.
        codes: uint8 ``[batch, kv_heads, capacity, packed_bytes]``.
        scale: float16 or float32, the grid of scales of `capacity` tokens.
        offset: like `scale`, or None (codebook).
        table: float32 ``[2**nbits]``, or None (affine).
        length: valid tokens.
    """

    def __init__(self, encoder: Encoder, like: Encoded, capacity: int, head_dim: int, device: torch.device) -> None:
        """Allocate a page of `capacity` tokens with the layout of `like`."""
        self.scheme, self._block, self.head_dim = encoder.scheme, encoder.block, head_dim
        self.length = 0
        batch, heads = like.codes.shape[:2]
        scales = capacity // self._tokens_per_scale
        self.codes = like.codes.new_empty((batch, heads, capacity, like.codes.shape[3]), device=device)
        self.scale = like.scale.new_empty((batch, heads, scales, like.scale.shape[3]), device=device)
        self.offset = None if like.offset is None else torch.empty_like(self.scale)
        self.table = None if like.table is None else like.table.to(device)

    @property
    def _tokens_per_scale(self) -> int:
        return self.scheme.group_size if self.scheme.axis == "channel" else 1

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.codes.shape[2]

    @property
    def wide(self) -> bool:
        """Whether its scales are wider than float16."""
        return self.scale.dtype != torch.float16

    def accepts(self, piece: Piece, at: int) -> bool:
        """Whether `piece` may be written behind token `at`."""
        return (
            isinstance(piece, Encoded)
            and at % self._block == 0
            and at + self._block <= self.capacity
            and piece.scale.dtype == self.scale.dtype
            and (piece.table is None) == (self.table is None)
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
        return stop - start

    def discard(self) -> None:
        """Forget tokens that were written and never counted: they lie in spare capacity."""

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `start` to `stop` as ``[batch, kv_heads, stop - start, head_dim]``."""
        axis, group_size, per = self.scheme.axis, self.scheme.group_size, self._tokens_per_scale
        first, last = start // per, -(-stop // per)
        codes = self._codes(first * per, last * per)
        scale = grouped_grid(self.scale[:, :, first:last].to(dtype), axis)
        if self.table is not None:
            states = grouped(self.table.to(dtype)[codes.int()], axis, group_size).mul_(scale)
        else:
            offset = grouped_grid(cast("Tensor", self.offset)[:, :, first:last].to(dtype), axis)
            states = grouped(codes.to(dtype), axis, group_size).mul_(scale).add_(offset)
        return ungrouped(states, axis)[:, :, start - first * per : stop - first * per]

    def _codes(self, start: int, stop: int) -> Tensor:
        """Return codes ``[batch, kv_heads, stop - start, head_dim]``; zeros behind the end of a page cut in a group."""
        codes = unpack(self.codes[:, :, start:stop], self.scheme.nbits, self.head_dim)
        missing = stop - start - codes.shape[2]
        return torch.nn.functional.pad(codes, (0, 0, 0, missing)) if missing else codes

    def select(self, indices: Tensor) -> None:
        """Keep batch rows `indices`, in that order."""
        self.codes, self.scale = _select(self.codes, indices), _select(self.scale, indices)
        self.offset = None if self.offset is None else _select(self.offset, indices)

    def trim(self, tokens: int) -> None:
        """Give back what lies behind the first `tokens` tokens."""
        if tokens < self.capacity:
            scales = -(-tokens // self._tokens_per_scale)
            self.codes = self.codes[:, :, :tokens].clone()
            self.scale = self.scale[:, :, :scales].clone()
            self.offset = None if self.offset is None else self.offset[:, :, :scales].clone()

    def to(self, device: torch.device) -> None:
        """Move to `device`."""
        self.codes, self.scale = self.codes.to(device), self.scale.to(device)
        self.offset = None if self.offset is None else self.offset.to(device)
        self.table = None if self.table is None else self.table.to(device)

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


class OpaquePage:
    """A page in a backend's own format: one `Opaque` for each block and batch row."""

    def __init__(self, encoder: Encoder, first_token: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
        """Make an empty page that begins at token `first_token` of the sequence; its list of blocks never fills up."""
        self._encoder, self._first_token = encoder, first_token
        self._kv_heads, self._head_dim, self._device = kv_heads, head_dim, device
        self._blocks: list[tuple[Opaque, ...]] = []
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens held: a list has no spare capacity."""
        return len(self._blocks) * self._encoder.block

    @property
    def wide(self) -> bool:
        """Opaque blocks have no scales that the core would know of."""
        return False

    def accepts(self, piece: Piece, at: int) -> bool:
        """Whether `piece` may be written behind token `at`."""
        return isinstance(piece, EncodedOpaque) and at % self._encoder.block == 0

    def write(self, piece: Piece, start: int, at: int) -> int:  # noqa: ARG002  # a block is written whole
        """Keep a block at token `at`, in place of what a crop or a failure left there; return its tokens."""
        block = cast("EncodedOpaque", piece)
        del self._blocks[at // self._encoder.block :]
        self._blocks.append(tuple(_opaque_to(row, self._device) for row in block.rows))
        return block.tokens

    def discard(self) -> None:
        """Forget blocks that were written and never counted."""
        del self._blocks[-(-self.length // self._encoder.block) :]

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `start` to `stop` as ``[batch, kv_heads, stop - start, head_dim]``."""
        block = self._encoder.block
        first, last = start // block, -(-stop // block)
        states = torch.cat([self._read_block(index, dtype) for index in range(first, last)], dim=2)
        return states[:, :, start - first * block : stop - first * block]

    def _read_block(self, index: int, dtype: torch.dtype) -> Tensor:
        encoder = self._encoder
        position = self._first_token + index * encoder.block
        shape = (1, self._kv_heads, encoder.block, self._head_dim)
        numbers = self._kv_heads * encoder.block * self._head_dim
        states = []
        for row in self._blocks[index]:
            try:
                values = encoder.read(row, numbers)
            except BackendContractError:
                raise
            except Exception as cause:
                raise QuantizationError(
                    encoder.backend, encoder.stream, position, position + encoder.block, cause, encoder.where
                ) from cause
            states.append(rows_to_states(values.to(dtype), shape, encoder.scheme.axis, encoder.scheme.group_size))
        return torch.cat(states)

    def select(self, indices: Tensor) -> None:
        """Keep batch rows `indices`, in that order; a row kept twice shares its memory."""
        order = indices.tolist()
        self._blocks = [tuple(rows[index] for index in order) for rows in self._blocks]

    def trim(self, tokens: int) -> None:
        """Forget blocks that lie behind the first `tokens` tokens."""
        del self._blocks[-(-tokens // self._encoder.block) :]

    def to(self, device: torch.device) -> None:
        """Move to `device`."""
        self._device = device
        self._blocks = [tuple(_opaque_to(row, device) for row in rows) for rows in self._blocks]

    def parts(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield ``(part, tensor, valid bytes)`` of every tensor that the page holds."""
        for rows in self._blocks:
            for row in rows:
                for tensor in row.tensors.values():
                    yield "codes", tensor, tensor.nbytes


def _opaque_to(row: Opaque, device: torch.device) -> Opaque:
    return Opaque({name: tensor.to(device) for name, tensor in row.tensors.items()}, row.meta)


def _select(tensor: Tensor, indices: Tensor) -> Tensor:
    """Select batch rows, in place and in bounded steps where the batch keeps its size (every step of a beam search)."""
    if len(indices) != tensor.shape[0]:
        return tensor.index_select(0, indices)
    step = max(1, _SELECT_BYTES // max(1, tensor[:, :, :1].nbytes))
    for part in tensor.split(step, dim=2):
        part.copy_(part.index_select(0, indices))
    return tensor

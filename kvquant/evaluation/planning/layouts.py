"""How a backend writes things down, found out by having it quantise a little random data; the rest is arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kvquant.engine.encode import Encoder
from kvquant.engine.memory import layer_memory
from kvquant.engine.outliers import kept_bytes
from kvquant.engine.pieces import Encoded, EncodedOpaque
from kvquant.evaluation.planning.occupancy import Occupancy

#: Blocks that are quantised to see how.
_BLOCKS = 2


class Layout(Protocol):
    """Bytes of the body of one stream.

    Attributes:
        shared: tensors that all pages have in common, and maybe other streams too: they take their memory once.
        shared_part: the part that they belong to.
    """

    @property
    def shared(self) -> tuple[Tensor, ...]: ...  # noqa: D102  # described above

    @property
    def shared_part(self) -> str: ...  # noqa: D102  # described above

    def parts(self, held: Occupancy, batch: int, heads: int) -> dict[str, int]:
        """Return bytes by part, those of `kvquant.engine.memory.PARTS` that the body has, without what is shared.

        Args:
            held: tokens of the store.
            batch, heads: of the states.
        """

    def widest(self) -> Layout:
        """Return the layout of states whose scales need the wider of the two types, see `Encoder.encode`."""


@dataclass(frozen=True)
class CanonicalLayout:
    """Packed codes and a grid of scales, in pages.

    Attributes:
        code_bytes: of the codes of one token of one head.
        scale_bytes: of one row of the grid of scales of one head, offsets included.
        tokens_per_scale: tokens that a row of the grid stands for.
        table_bytes: of a codebook's table, where each page keeps one of its own.
        shared: a codebook's table, where it is one and the same.
        wider: how many times larger scales are in the wider type.
        block, outlier_bytes: tokens of a block, and bytes of the outlier tokens of one block of one head.
    """

    code_bytes: int
    scale_bytes: int
    tokens_per_scale: int
    table_bytes: int
    shared: tuple[Tensor, ...]
    wider: int
    block: int
    outlier_bytes: int
    shared_part: str = "tables"

    def parts(self, held: Occupancy, batch: int, heads: int) -> dict[str, int]:
        """Return bytes by part."""
        per, rows = self.tokens_per_scale, batch * heads
        scales = sum(-(-length // per) for length, _ in held.pages)
        room, room_for_scales = sum(room for _, room in held.pages), sum(room // per for _, room in held.pages)
        unused, unused_scales = room - held.body, room_for_scales - scales
        spare = unused * self.code_bytes + unused_scales * self.scale_bytes + unused // self.block * self.outlier_bytes
        return {
            "codes": rows * held.body * self.code_bytes,
            "scales": rows * scales * self.scale_bytes,
            "tables": len(held.pages) * self.table_bytes,
            "outliers": rows * held.body // self.block * self.outlier_bytes,
            "spare": rows * spare,
        }

    def widest(self) -> CanonicalLayout:
        """Return the layout with scales in the wider type."""
        return replace(self, scale_bytes=self.scale_bytes * self.wider, wider=1)


@dataclass(frozen=True)
class OpaqueLayout:
    """Blocks in a backend's own form, one for each batch row.

    Attributes:
        block: tokens of a block.
        block_bytes, block_spare: of the tensors of one block of all heads, and of what lies unused in their memory.
        outlier_bytes: of the outlier tokens of one block of one head.
        shared: what all blocks share.
    """

    block: int
    block_bytes: int
    block_spare: int
    outlier_bytes: int
    shared: tuple[Tensor, ...]
    shared_part: str = "codes"

    def parts(self, held: Occupancy, batch: int, heads: int) -> dict[str, int]:
        """Return bytes by part."""
        blocks = batch * held.body // self.block
        return {
            "codes": blocks * self.block_bytes,
            "outliers": blocks * heads * self.outlier_bytes,
            "spare": blocks * self.block_spare,
        }

    def widest(self) -> OpaqueLayout:
        """Return the same: the core knows of no scales in it."""
        return self


def find_layout(encoder: Encoder, like: Tensor) -> Layout:
    """Quantise unit normal numbers as a cache would, and look at what comes back.

    Args:
        encoder: of the stream, with the real backend.
        like: ``[any, kv_heads, any, head_dim]``, gives heads, channels, type and device of the states.

    Raises:
        QuantizationError, BackendContractError: the backend fails.
    """
    is_opaque, kv_heads, head_dim = "opaque" in encoder.formats, like.shape[1], like.shape[3]
    outlier_bytes = kept_bytes(encoder.kept, head_dim, like.element_size())
    shape = (1, kv_heads if is_opaque else 1, _BLOCKS * encoder.block, head_dim)
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device)
    pieces = [piece for block in states.split(encoder.block, dim=2) for piece in encoder.encode(block, 0)]
    if is_opaque:
        return _opaque(encoder, [piece for piece in pieces if isinstance(piece, EncodedOpaque)], outlier_bytes)
    return _canonical(encoder, [piece for piece in pieces if isinstance(piece, Encoded)], outlier_bytes)


def _canonical(encoder: Encoder, pieces: list[Encoded], outlier_bytes: int) -> CanonicalLayout:
    piece = pieces[-1]
    tables = [piece.table for piece in pieces if piece.table is not None]
    shared = tuple(_common(tables[:1], tables[1:]))
    return CanonicalLayout(
        code_bytes=piece.codes.shape[3],
        scale_bytes=piece.scale.shape[3] * piece.scale.element_size() * (1 if piece.offset is None else 2),
        tokens_per_scale=piece.tokens // piece.scale.shape[2],
        table_bytes=tables[0].nbytes if tables and not shared else 0,
        shared=shared,
        wider=encoder.border.wide_dtype.itemsize // piece.scale.element_size(),
        block=encoder.block,
        outlier_bytes=outlier_bytes,
    )


def _opaque(encoder: Encoder, pieces: list[EncodedOpaque], outlier_bytes: int) -> OpaqueLayout:
    first, second = ([tensor for row in piece.rows for tensor in row.tensors.values()] for piece in pieces)
    shared = list(_common(first, second))
    known = {id(tensor) for tensor in shared}
    memory = layer_memory(0, 0, (0, 0), [("codes", one, one.nbytes) for one in first if id(one) not in known])
    return OpaqueLayout(encoder.block, memory.parts["codes"], memory.parts["spare"], outlier_bytes, tuple(shared))


def _common(first: Iterable[Tensor], second: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield tensors of the first that share their memory with one of the second."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in second}
    return (tensor for tensor in first if tensor.untyped_storage().data_ptr() in seen)

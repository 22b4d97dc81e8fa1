"""Full-precision states to quantised pieces: the one place that calls a backend's `quantize`.

States go through in bounded chunks, what comes back is checked at this border, and codes are packed. The result is a
list of *pieces*, runs of whole blocks that share one layout; nothing of a store has changed yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from kvquant.engine.border import Border
from kvquant.engine.grouping import rows_to_states, scale_grid_shape, states_to_rows
from kvquant.engine.packing import pack, widths_of
from kvquant.errors import BackendContractError, QuantizationError
from kvquant.plugin.quantizer import Opaque, OpaqueQuantizer, QuantizedRows, Quantizer
from kvquant.plugin.spec import Scheme
from kvquant.transforms.rotations import Rotation

#: Numbers handed to a backend in one call at most (unless one block of one batch row has more): 4 MiB in float32.
CHUNK_ELEMENTS = 1 << 20

#: Share of a quantisation step that rounding scale and offset to float16 may cost; beyond it they stay in float32.
_HALF_PRECISION_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class Encoded:
    """A piece in a canonical format.

    Attributes:
        codes: uint8 ``[batch, kv_heads, tokens, packed_bytes]``.
        scale: floating, shaped as the grid of scales (see `grouping`).
        offset: like `scale` (affine), or None (codebook).
        table: floating ``[2**nbits]`` (codebook), or None (affine). Of a mixed width, those of both halves in turn.
        fits_half: whether scale and offset lose little in float16.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    table: Tensor | None
    fits_half: bool = False

    def narrowed(self) -> Encoded:
        """Return the piece with scales in float16."""
        offset = None if self.offset is None else self.offset.half()
        return Encoded(self.codes, self.scale.half(), offset, self.table, fits_half=True)

    @property
    def tokens(self) -> int:
        """Tokens in the piece."""
        return self.codes.shape[2]


@dataclass(frozen=True, eq=False)
class EncodedOpaque:
    """A block in a backend's own format: one `Opaque` a batch row, so that rows can be selected without reading it."""

    rows: tuple[Opaque, ...]
    tokens: int


Piece = Encoded | EncodedOpaque


@dataclass(frozen=True)
class Encoder:
    """Quantises the states of one stream of one layer.

    Attributes:
        backend: the backend's name, for messages.
        quantizer: the backend's object.
        scheme: bits, axis and group size; of the first half of the channels where `lower` is there.
        stream: ``"key"`` or ``"value"``.
        where: the layer, for messages.
        block: tokens of a block.
        dtype: floating type in which rows are handed to the backend.
        formats: formats that the backend declared; opaque stands alone.
        rotation: what is done to states before; None for nothing.
        lower: what quantises the second half of the channels, in one bit less; None where all have the same width.
    """

    backend: str
    quantizer: Quantizer
    scheme: Scheme
    stream: str
    where: str
    block: int
    dtype: torch.dtype
    formats: tuple[str, ...]
    rotation: Rotation | None = None
    lower: Encoder | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Encoder:
        return self  # quantizers keep no state between calls, so copies of a cache share them

    @property
    def nbits(self) -> float:
        """Bits of a code, on average over the channels."""
        return self.scheme.nbits if self.lower is None else (self.scheme.nbits + self.lower.scheme.nbits) / 2

    def encode(self, states: Tensor, first_token: int, *, wide: bool = False) -> Iterator[Piece]:
        """Quantise states, each token once, a bounded chunk at a time.

        Scales are kept in float16 until a block comes that float16 would harm, and in float32 from there on: so the
        layout changes once at most, and depends on the tokens alone, not on how they came.

        Args:
            states: ``[batch, kv_heads, tokens, head_dim]``; tokens a multiple of `block`.
            first_token: position of the first of them in the sequence, for messages.
            wide: whether such a block has come before.

        Yields:
            The pieces in order of tokens.

        Raises:
            QuantizationError: the backend raised.
            BackendContractError: the backend returned something that it must not.
        """
        for start, stop in self._chunks(states):
            try:
                pieces = self._encode_chunk(self._rotated(states[:, :, start:stop]))
            except BackendContractError:
                raise
            except Exception as cause:
                raise QuantizationError(
                    self.backend, self.stream, first_token + start, first_token + stop, cause, self.where
                ) from cause
            for piece in pieces:
                wide = wide or (isinstance(piece, Encoded) and not piece.fits_half)
                yield piece.narrowed() if isinstance(piece, Encoded) and not wide else piece

    def _chunks(self, states: Tensor) -> Iterator[tuple[int, int]]:
        batch, heads, tokens, head_dim = states.shape
        step = max(1, CHUNK_ELEMENTS // max(1, batch * heads * head_dim * self.block)) * self.block
        for start in range(0, tokens, step):
            yield start, min(start + step, tokens)

    def _encode_chunk(self, states: Tensor) -> list[Piece]:
        if "opaque" in self.formats:
            return self._encode_opaque(states)
        # A block of a large batch can exceed the budget on its own; batch rows are independent, so go through them.
        rows_per_call = max(1, CHUNK_ELEMENTS // max(1, states.shape[1:].numel()))
        parts = [self._encode_rows(part) for part in states.split(rows_per_call)]
        return list(self._by_scale_dtype(parts[0] if len(parts) == 1 else self._join(parts)))

    @property
    def border(self) -> Border:
        """The checks that everything passes on its way from the backend into the core."""
        return Border(self.backend, self.scheme, self.formats, torch.promote_types(self.dtype, torch.float32))

    def _rotated(self, states: Tensor) -> Tensor:
        exact = states.to(self.dtype)
        return exact if self.rotation is None else self.rotation.apply(exact)

    def _quantize(self, states: Tensor) -> QuantizedRows | Opaque:
        rows = states_to_rows(states, self.scheme.axis, self.scheme.group_size)
        if rows.untyped_storage().data_ptr() == states.untyped_storage().data_ptr():
            rows = rows.clone()  # a backend that writes into its input must not reach the model's tensors
        return self.quantizer.quantize(rows.contiguous())

    def _encode_rows(self, states: Tensor) -> Encoded:
        if self.lower is None:
            piece = self._unpacked(states)
        else:
            first, second = states.chunk(2, dim=3)
            piece = self._beside(self._unpacked(first), self.lower._unpacked(second))
        return replace(piece, codes=pack(piece.codes, self.nbits))

    def _unpacked(self, states: Tensor) -> Encoded:
        """Return a piece whose codes are ``[batch, kv_heads, tokens, channels]``."""
        scheme = self.scheme
        shape = (states.shape[0], states.shape[1], states.shape[2], states.shape[3])
        result = self._quantize(states)
        n_groups = states.numel() // scheme.group_size
        border = self.border
        rows = border.rows(result, n_groups, states.device)
        codes = rows_to_states(rows.codes, shape, scheme.axis, scheme.group_size)
        grid = scale_grid_shape(shape, scheme.axis, scheme.group_size)
        return Encoded(
            codes=codes,
            scale=rows.scale.to(border.wide_dtype).reshape(grid),
            offset=None if rows.offset is None else rows.offset.to(border.wide_dtype).reshape(grid),
            table=None if rows.table is None else rows.table.to(border.wide_dtype),
        )

    def _encode_opaque(self, states: Tensor) -> list[Piece]:
        pieces: list[Piece] = []
        for block in states.split(self.block, dim=2):
            packed = []
            for row in block.split(1):
                result = self._quantize(row)
                packed.append(self.border.opaque(result))
            if packed and not pieces:
                # One block of a call is read back before the states that it stands for are let go.
                self.read(packed[0], block[0].numel())
            pieces.append(EncodedOpaque(tuple(packed), self.block))
        return pieces

    def read(self, packed: Opaque, numbers: int) -> Tensor:
        """Have the backend read one of its own blocks.

        Args:
            packed: the block of one batch row.
            numbers: how many it stands for.

        Returns:
            Floating ``[n_groups, group_size]``.

        Raises:
            BackendContractError: the backend returned something of another kind or shape.
        """
        values = cast("OpaqueQuantizer", self.quantizer).dequantize(packed)
        return self.border.read(values, numbers // self.scheme.group_size)

    def _beside(self, first: Encoded, second: Encoded) -> Encoded:
        """Join the two halves of the channels."""
        if (first.table is None) != (second.table is None):
            raise BackendContractError(
                self.backend, f"nbits={self.nbits} cannot be mixed: its two widths came in different formats"
            )

        def joined(one: Tensor | None, other: Tensor | None, dim: int = 3) -> Tensor | None:
            return None if one is None else torch.cat([one, _given(other)], dim)

        return Encoded(
            codes=torch.cat([first.codes, second.codes], 3),
            scale=torch.cat([first.scale, second.scale], 3),
            offset=joined(first.offset, second.offset),
            table=joined(first.table, second.table, 0),
        )

    def _join(self, parts: list[Encoded]) -> Encoded:
        """Join pieces of different batch rows along the batch."""
        first = parts[0]
        if any(part.table is not None and not torch.equal(part.table, _given(first.table)) for part in parts):
            raise BackendContractError(
                self.backend, "table differs between calls; a codebook must not depend on the rows"
            )
        return Encoded(
            codes=torch.cat([part.codes for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            offset=None if first.offset is None else torch.cat([_given(part.offset) for part in parts]),
            table=first.table,
        )

    # -------------------------------------------------------------------------------------------- stored precision

    def _by_scale_dtype(self, piece: Encoded) -> Iterator[Encoded]:
        """Cut a piece into runs of blocks whose scales fit float16 and runs whose scales do not.

        float16 holds most scales with an error that is small beside a quantisation step, at half the bytes. Each
        block is judged by itself, so that the answer does not depend on which blocks came in one call.
        """
        fits = self._fits_half(piece).tolist()
        tokens_per_scale = self.scheme.group_size if self.scheme.axis == "channel" else 1
        start = 0
        while start < len(fits):
            stop = start
            while stop < len(fits) and fits[stop] == fits[start]:
                stop += 1
            tokens = slice(start * self.block, stop * self.block)
            scales = slice(tokens.start // tokens_per_scale, tokens.stop // tokens_per_scale)
            yield Encoded(
                codes=piece.codes[:, :, tokens],
                scale=piece.scale[:, :, scales],
                offset=None if piece.offset is None else piece.offset[:, :, scales],
                table=piece.table,
                fits_half=fits[start],
            )
            start = stop

    def _fits_half(self, piece: Encoded) -> Tensor:
        """Return bool ``[blocks]``: rounding to float16 costs a small share of a step, for every group of the block."""
        scale, widths = piece.scale, widths_of(self.nbits)
        step = scale.abs()
        if piece.table is None:
            reaches = [2.0**width - 1 for width in widths]
        else:
            reaches = [_entry_over_gap(table) for table in piece.table.split([2**width for width in widths])]
        reach = scale.new_tensor(reaches).repeat_interleave(scale.shape[3] // len(widths))
        error = (scale.half().to(scale.dtype) - scale).abs() * reach
        if piece.offset is not None:
            error += (piece.offset.half().to(scale.dtype) - piece.offset).abs()
        by_block: Tensor = (error <= _HALF_PRECISION_SHARE * step).unflatten(2, (piece.tokens // self.block, -1))
        return by_block.transpose(0, 2).flatten(1).all(dim=1)


def _entry_over_gap(table: Tensor) -> float:
    """Return the largest magnitude of a table's entry over the gap to its nearest neighbour."""
    entries = table.unique()  # sorted
    gaps = entries.diff()
    nearest = torch.minimum(
        torch.nn.functional.pad(gaps, (1, 0), value=torch.inf), torch.nn.functional.pad(gaps, (0, 1), value=torch.inf)
    )
    return float((entries.abs() / nearest).max())


def _given(tensor: Tensor | None) -> Tensor:
    """Return a tensor that the format guarantees to be there."""
    if tensor is None:
        raise ValueError("pieces of one call differ in format")
    return tensor

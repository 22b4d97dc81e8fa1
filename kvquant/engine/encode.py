"""Full-precision states to quantised pieces: the one place that calls a backend's `quantize`.

States go through in bounded chunks, what comes back is checked at this border, and codes are packed. The result is a
list of *pieces*, runs of whole blocks that share one layout; nothing of a store has changed yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from kvquant.engine.border import Border
from kvquant.engine.grouping import rows_to_states, scale_grid_shape, states_to_rows
from kvquant.engine.outliers import Outliers
from kvquant.engine.packing import pack, table_sizes, widths_of
from kvquant.engine.pieces import Encoded, EncodedOpaque, Piece
from kvquant.engine.scales import Levels, to_bytes
from kvquant.engine.trellis import Taps, level_indices
from kvquant.errors import BackendContractError, QuantizationError, TransformError
from kvquant.plugin.quantizer import Opaque, OpaqueQuantizer, QuantizedRows, Quantizer
from kvquant.plugin.spec import Scheme
from kvquant.transforms.frame import Frame
from kvquant.transforms.heads import HeadTransform

#: Numbers handed to a backend in one call at most (unless one block of one batch row has more): 4 MiB in float32.
CHUNK_ELEMENTS = 1 << 20

#: Share of a quantisation step that rounding scale and offset to float16 may cost; beyond it they stay in float32.
_HALF_PRECISION_SHARE = 0.25

_Part = TypeVar("_Part")


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
        transform: what is done to the channels before; None for nothing.
        smooths: whether channels are smoothed before that, see `kvquant.transforms.smoothing`.
        scale_bits: bits in which scales are stored, as far as that does no harm: 8 or 16.
        kept: outlier tokens of a block, of each batch row and head, whose states are kept as they are.
        lower: scheme and quantizer of the second half of the channels, of one bit less; None where all have the same
            width.
    """

    backend: str
    quantizer: Quantizer
    scheme: Scheme
    stream: str
    where: str
    block: int
    dtype: torch.dtype
    formats: tuple[str, ...]
    transform: HeadTransform | None = None
    smooths: bool = False
    scale_bits: int = 16
    kept: int = 0
    lower: tuple[Scheme, Quantizer] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Encoder:
        return self  # quantizers keep no state between calls, so copies of a cache share them

    @property
    def nbits(self) -> float:
        """Bits of a code, on average over the channels."""
        return self.scheme.nbits if self.lower is None else (self.scheme.nbits + self.lower[0].nbits) / 2

    def encode(self, states: Tensor, first_token: int, frame: Frame | None = None, bits: int = 0) -> Iterator[Piece]:
        """Quantise states, each token once, a bounded chunk at a time.

        Scales are kept in few bits until a block comes that those would harm, and in more from there on: so the layout
        changes seldom, and depends on the tokens that are quantised alone, not on how they came.

        Args:
            states: ``[batch, kv_heads, tokens, head_dim]``; tokens a multiple of `block`.
            first_token: position of the first of them in the sequence, for messages.
            frame: in which they are quantised; None for one that does not depend on what came before.
            bits: of the scales of the block before.

        Yields:
            The pieces in order of tokens.

        Raises:
            QuantizationError: the backend raised.
            BackendContractError: the backend returned something that it must not.
            TransformError: the transform failed.
        """
        frame, bits = frame or Frame(transform=self.transform), max(bits, self.scale_bits)
        for start, stop in self._chunks(states):
            try:
                given = states[:, :, start:stop]
                pieces = self._encode_chunk(frame.enter(given.to(self.dtype)), given, bits)
            except (BackendContractError, TransformError):
                raise
            except Exception as cause:
                raise QuantizationError(
                    self.backend, self.stream, first_token + start, first_token + stop, cause, self.where
                ) from cause
            for piece, needed in pieces:
                bits = max(bits, needed)
                yield piece.stored(bits) if isinstance(piece, Encoded) else piece

    def _chunks(self, states: Tensor) -> Iterator[tuple[int, int]]:
        batch, heads, tokens, head_dim = states.shape
        step = max(1, CHUNK_ELEMENTS // max(1, batch * heads * head_dim * self.block)) * self.block
        for start in range(0, tokens, step):
            yield start, min(start + step, tokens)

    def _encode_chunk(self, states: Tensor, given: Tensor, bits: int) -> list[tuple[Piece, int]]:
        """Return pieces, and the bits that their scales need.

        Args:
            states: what was `given`, in its frame.
            given: ``[batch, kv_heads, tokens, head_dim]``.
            bits: that scales have at least.
        """
        if "opaque" in self.formats:
            return [(piece, 0) for piece in self._encode_opaque(states, given)]
        # A block of a large batch can exceed the budget on its own; batch rows are independent, so go through them.
        rows_per_call = max(1, CHUNK_ELEMENTS // max(1, states.shape[1:].numel()))
        both = zip(states.split(rows_per_call), given.split(rows_per_call), strict=True)
        parts = [self._encode_rows(*part, bits) for part in both]
        return list(self._by_precision(parts[0] if len(parts) == 1 else self._join(parts), bits))

    @property
    def border(self) -> Border:
        """The checks that everything passes on its way from the backend into the core."""
        return self._border(self.scheme)

    def _border(self, scheme: Scheme) -> Border:
        return Border(self.backend, scheme, self.formats, torch.promote_types(self.dtype, torch.float32))

    def _rows(self, states: Tensor) -> Tensor:
        rows = states_to_rows(states, self.scheme.axis, self.scheme.group_size)
        if rows.untyped_storage().data_ptr() == states.untyped_storage().data_ptr():
            rows = rows.clone()  # a backend that writes into its input must not reach the model's tensors
        return rows.contiguous()

    def _encode_rows(self, states: Tensor, given: Tensor, bits: int) -> Encoded:
        halves = [(self.scheme, self.quantizer), *([] if self.lower is None else [self.lower])]
        both = zip(states.chunk(len(halves), dim=3), halves, strict=True)
        parts = [self._unpacked(part, *half, bits) for part, half in both]
        piece, read = parts[0]
        if self.lower is not None:
            piece = self._beside(piece, parts[1][0])
            read = torch.cat([read, parts[1][1]], 3) if self.kept else read
        outliers = self._outliers(given, states, read) if self.kept else None
        packed = replace(piece, codes=pack(piece.codes, self.nbits), outliers=outliers)
        if piece.compact is None:
            return packed
        compact = replace(piece.compact, codes=pack(piece.compact.codes, self.nbits), outliers=outliers)
        return replace(packed, compact=compact)

    def _unpacked(self, states: Tensor, scheme: Scheme, quantizer: Quantizer, bits: int) -> tuple[Encoded, Tensor]:
        """Quantise channels of one width.

        Args:
            states: ``[batch, kv_heads, tokens, channels]``.
            scheme, quantizer: of these channels.
            bits: that scales have at least.

        Returns:
            A piece whose codes are ``[batch, kv_heads, tokens, channels]``; and what is read for the states, if there
            are outliers to be chosen (else nothing).
        """
        numbers = self._rows(states)
        border = self._border(scheme)
        rows = border.rows(quantizer.quantize(numbers), len(numbers), states.device)
        wide = border.wide_dtype
        rows = QuantizedRows(
            codes=rows.codes,
            scale=rows.scale.to(wide),
            offset=None if rows.offset is None else rows.offset.to(wide),
            table=None if rows.table is None else rows.table.to(wide),
            taps=rows.taps,
        )
        piece = self._laid_out(states, rows)
        read = self._as_states(_values(rows), states) if self.kept else states.new_empty(0)
        if bits > 8:
            return piece, read
        # Offsets in bytes are relative to the levels of the whole row, which has one kind of them.
        compact, fits = to_bytes(rows, numbers.to(wide), scheme.nbits, Levels.of(self.nbits, rows.table))
        fitting = fits.reshape(piece.scale.shape)
        return replace(piece, compact=self._laid_out(states, compact), fits=fitting), read

    def _laid_out(self, states: Tensor, rows: QuantizedRows) -> Encoded:
        """Return rows of `states` as they are stored, but for codes, which are not packed."""
        scheme, shape = self.scheme, (states.shape[0], states.shape[1], states.shape[2], states.shape[3])
        grid = scale_grid_shape(shape, scheme.axis, scheme.group_size)
        return Encoded(
            codes=self._as_states(rows.codes, states),
            scale=rows.scale.reshape(grid),
            offset=None if rows.offset is None else rows.offset.reshape(grid),
            table=rows.table,
            taps=None if rows.taps is None else Taps(*rows.taps),
        )

    def _as_states(self, rows: Tensor, states: Tensor) -> Tensor:
        """Return rows, which are of `states`, in their shape."""
        shape = (states.shape[0], states.shape[1], states.shape[2], states.shape[3])
        return rows_to_states(rows, shape, self.scheme.axis, self.scheme.group_size)

    def _outliers(self, given: Tensor, states: Tensor, read: Tensor) -> Outliers:
        """Return the tokens of `given` that are kept, where `read` is what is read for `states`."""
        return Outliers.chosen(given, states.to(read.dtype) - read, self.block, self.kept)

    def _encode_opaque(self, states: Tensor, given: Tensor) -> list[Piece]:
        pieces: list[Piece] = []
        for block, exact in zip(states.split(self.block, dim=2), given.split(self.block, dim=2), strict=True):
            packed = [self.border.opaque(self.quantizer.quantize(self._rows(row))) for row in block.split(1)]
            if packed and not pieces and not self.kept:
                # One block of a call is read back before the states that it stands for are let go.
                self.read(packed[0], block[0].numel())
            outliers = None
            if self.kept:
                read = [self.read(one, block[0].numel()).to(self.border.wide_dtype) for one in packed]
                values = torch.cat(read) if read else self._rows(block).to(self.border.wide_dtype)
                outliers = self._outliers(exact, block, self._as_states(values, block))
            pieces.append(EncodedOpaque(tuple(packed), self.block, outliers))
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
            compact=None if first.compact is None else self._beside(first.compact, _given(second.compact)),
            fits=joined(first.fits, second.fits),
        )

    def _join(self, parts: list[Encoded]) -> Encoded:
        """Join pieces of different batch rows along the batch."""
        first = parts[0]
        if any(part.table is not None and not torch.equal(part.table, _given(first.table)) for part in parts):
            raise BackendContractError(
                self.backend, "table differs between calls; a codebook must not depend on the rows"
            )
        if any(part.taps != first.taps for part in parts):
            raise BackendContractError(self.backend, "taps differ between calls; a trellis must not depend on the rows")
        return Encoded(
            codes=torch.cat([part.codes for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            offset=None if first.offset is None else torch.cat([_given(part.offset) for part in parts]),
            table=first.table,
            taps=first.taps,
            outliers=Outliers.joined([_given(part.outliers) for part in parts], dim=0) if self.kept else None,
            compact=None if first.compact is None else self._join([part.compact or part for part in parts]),
            fits=None if first.fits is None else torch.cat([_given(part.fits) for part in parts]),
        )

    # -------------------------------------------------------------------------------------------- stored precision

    def _by_precision(self, piece: Encoded, bits: int) -> Iterator[tuple[Encoded, int]]:
        """Cut a piece into runs of blocks whose scales take the same bits, `bits` at least, and say how many.

        float16 holds most scales with an error that is small beside a quantisation step, at half the bytes, and so do
        8 bits where codes are chosen after them. Each block is judged by itself and by the bits of the one before, so
        that the answer does not depend on which blocks came in one call.
        """
        needs = self._needed_bits(piece, bits)
        tokens_per_scale = self.scheme.group_size if self.scheme.axis == "channel" else 1
        start = 0
        while start < len(needs):
            stop = start
            while stop < len(needs) and needs[stop] == needs[start]:
                stop += 1
            tokens = slice(start * self.block, stop * self.block)
            rows = slice(tokens.start // tokens_per_scale, tokens.stop // tokens_per_scale)
            yield piece.run(slice(start, stop), tokens, rows), needs[start]
            start = stop

    def _needed_bits(self, piece: Encoded, bits: int) -> list[int]:
        """Return the bits that the scales of every block take, where those before take `bits`.

        A block that would do with bytes may need more than 16 bits all the same once bytes are given up: its codes are
        then those of the backend, not those that were chosen after rounding.
        """
        blocks, widest = piece.tokens // self.block, 8 * piece.scale.element_size()
        in_bytes = [False] * blocks if piece.fits is None else _in_every(piece.fits, blocks).tolist()
        if bits <= 8 and all(in_bytes):
            return [8] * blocks
        in_half = _in_every(self._fits_half(piece), blocks).tolist()
        taken = []
        for byte, half in zip(in_bytes, in_half, strict=True):
            needed = 8 if byte and bits <= 8 else 16 if half else widest
            bits = max(bits, needed)
            taken.append(bits)
        return taken

    def _fits_half(self, piece: Encoded) -> Tensor:
        """Return bool like the grid of scales: whether rounding to float16 costs a small share of a step."""
        scale, widths = piece.scale, widths_of(self.nbits)
        step = scale.abs()
        if piece.table is None:
            reaches = [2.0**width - 1 for width in widths]
        else:
            reaches = [_entry_over_gap(table) for table in piece.table.split(table_sizes(self.nbits, piece.taps))]
        error = (scale.half().to(scale.dtype) - scale).abs()
        for part, reach in zip(error.chunk(len(widths), dim=3), reaches, strict=True):
            part.mul_(reach)
        if piece.offset is not None:
            error += (piece.offset.half().to(scale.dtype) - piece.offset).abs()
        return error <= _HALF_PRECISION_SHARE * step


def _in_every(groups: Tensor, blocks: int) -> Tensor:
    """Return bool ``[blocks]``: whether it is so for every group of the block, ``[batch, kv_heads, rows, columns]``."""
    by_block: Tensor = groups.unflatten(2, (blocks, -1))
    return by_block.transpose(0, 2).flatten(1).all(dim=1)


def _entry_over_gap(table: Tensor) -> float:
    """Return the largest magnitude of a table's entry over the gap to its nearest neighbour."""
    entries = table.unique()  # sorted
    gaps = entries.diff()
    nearest = torch.minimum(
        torch.nn.functional.pad(gaps, (1, 0), value=torch.inf), torch.nn.functional.pad(gaps, (0, 1), value=torch.inf)
    )
    return float((entries.abs() / nearest).max())


def _values(rows: QuantizedRows) -> Tensor:
    """Return what rows of a canonical format stand for, ``[n_groups, group_size]``, in the type of their scales."""
    scale, codes = rows.scale.unsqueeze(1), rows.codes
    if rows.taps is not None:
        codes = level_indices(codes, Taps(*rows.taps), 1)
    numbers = codes.to(scale.dtype) if rows.table is None else rows.table[codes.int()]
    return numbers * scale if rows.offset is None else numbers * scale + rows.offset.unsqueeze(1)


def _given(part: _Part | None) -> _Part:
    """Return what the format guarantees to be there."""
    if part is None:
        raise ValueError("pieces of one call differ in format")
    return part

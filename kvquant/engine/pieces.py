"""Quantised pieces: runs of whole blocks that share one layout, on their way from a backend into pages."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from kvquant.engine.outliers import Outliers
from kvquant.engine.trellis import Taps
from kvquant.plugin.quantizer import Opaque


@dataclass(frozen=True, eq=False)
class Encoded:
    """A piece in a canonical format.

    Attributes:
        codes: uint8 ``[batch, kv_heads, tokens, packed_bytes]``.
        scale: the grid of scales (see `grouping`), floating or in bytes (see `scales`).
        offset: like `scale`, or None.
        table: floating, what codes stand for, or None where they are their own numbers (affine). Of a mixed width, the
            tables of both halves in turn.
        taps: of the trellis, or None where there is none.
        outliers: tokens whose states are kept, or None.
        compact: the same piece with scales in 8 bits, and codes chosen after them; None if it was not asked for.
        fits: bool, like `scale`: which groups lose nothing that matters in `compact`.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    table: Tensor | None
    taps: Taps | None = None
    outliers: Outliers | None = None
    compact: Encoded | None = None
    fits: Tensor | None = None

    def stored(self, bits: int) -> Encoded:
        """Return the piece as it is stored with scales of `bits` bits."""
        if bits == 8 and self.compact is not None:
            return self.compact
        whole = replace(self, compact=None, fits=None)
        if bits > 16:
            return whole
        offset = None if self.offset is None else self.offset.half()
        return replace(whole, scale=self.scale.half(), offset=offset)

    def run(self, blocks: slice, tokens: slice, rows: slice) -> Encoded:
        """Return some of its blocks, which have these tokens, and these rows of the grid of scales."""
        return Encoded(
            codes=self.codes[:, :, tokens],
            scale=self.scale[:, :, rows],
            offset=None if self.offset is None else self.offset[:, :, rows],
            table=self.table,
            taps=self.taps,
            outliers=None if self.outliers is None else self.outliers.blocks(blocks.start, blocks.stop),
            compact=None if self.compact is None else self.compact.run(blocks, tokens, rows),
        )

    @property
    def tokens(self) -> int:
        """Tokens in the piece."""
        return self.codes.shape[2]


@dataclass(frozen=True, eq=False)
class EncodedOpaque:
    """A block in a backend's own format: one `Opaque` a batch row, so that rows can be selected without reading it."""

    rows: tuple[Opaque, ...]
    tokens: int
    outliers: Outliers | None = None


Piece = Encoded | EncodedOpaque

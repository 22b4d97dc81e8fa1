"""Codebook quantisation with the `bitsandbytes` library: nf4 and fp4 in 4 bits, its dynamic map in 8.

A number becomes the nearest entry of a table, times the largest absolute value of its row:
``table[code] * scale`` with ``scale = max(abs(row))``. See QLoRA (https://arxiv.org/abs/2305.14314) for nf4 and "8-bit
Optimizers via Block-wise Quantization" (https://arxiv.org/abs/2110.02861) for the dynamic map, for which the
library's kernel on CPU misses the nearest entry by up to 3e-5 of the scale.

**Wrong numbers on CPU, and why they cannot come from here.** On some processors `dequantize_4bit` of bitsandbytes 0.50
takes a row of n numbers to have ``n // block_size`` blocks. Where n is no multiple of the block size it reads the
scales of other blocks (head_dim 64 with blocks of 128 or 256, say: the first scale for every row). The codes and scales
of `quantize_4bit` are right at all sizes. This backend takes only those, and hands over whole blocks.

The library's double quantisation (scales in 8 bits) is no option: the core stores every scale in 16 bits, so it would
save none and add its error.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import TYPE_CHECKING

from kvquant.plugin import BackendSpec, Capabilities, QuantizedRows, Requirement, Scheme, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

#: Tables by nbits, the default first.
_TABLES = {4: ("nf4", "fp4"), 8: ("dynamic",)}

#: The smallest and the largest block that every device takes, by nbits; between them, the powers of two.
_BLOCKS = {4: (32, 4096), 8: (64, 4096)}

#: Numbers worked on at once, to bound temporaries.
_PIECE = 1 << 18


def _functional() -> ModuleType:
    """Import bitsandbytes without its remark, to every user of some processors, that an optional part is missing."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    finally:
        logger.setLevel(level)
    return functional  # type: ignore[no-any-return]  # the library has no types


class BitsAndBytesQuantizer:
    """bitsandbytes' blockwise quantisation, one block a row. Keeps nothing between calls."""

    def __init__(self, scheme: Scheme) -> None:
        """Read the options and import bitsandbytes, so that both fail here if they do.

        Args:
            scheme: bits, group size and the option ``quant_type``.

        Raises:
            ValueError: nbits is neither 4 nor 8, the group is larger than the largest block, or ``quant_type`` is
                unknown or does not fit nbits.
        """
        known = _TABLES.get(scheme.nbits)
        if known is None:
            raise ValueError(f"nbits={scheme.nbits} is not supported; supported: {', '.join(map(str, _TABLES))}")
        self.quant_type = scheme.options.get("quant_type", known[0])
        if self.quant_type not in known:
            raise ValueError(
                f"quant_type={self.quant_type!r} is not supported with nbits={scheme.nbits}; "
                f"supported: {', '.join(known)}"
            )
        smallest, largest = _BLOCKS[scheme.nbits]
        if not 0 < scheme.group_size <= largest:
            raise ValueError(f"group_size={scheme.group_size} is not supported; supported: 1 to {largest}")
        # A row shorter than its block is filled up with zeros, which change neither its scale nor its codes.
        self.block = max(smallest, 1 << (scheme.group_size - 1).bit_length())
        functional = _functional()
        self._quantize_4bit, self._quantize_8bit = functional.quantize_4bit, functional.quantize_blockwise

    def quantize(self, rows: Tensor) -> QuantizedRows:
        """Quantise each row to ``table[codes] * scale``.

        Args:
            rows: floating ``[n_groups, group_size]``, finite.

        Returns:
            codes uint8 ``[n_groups, group_size]``; scale float32 ``[n_groups]``; table float32 ``[2**nbits]``.
        """
        import torch

        pieces = [self._quantize(piece) for piece in rows.split(max(1, _PIECE // self.block))]
        codes, scale, tables = zip(*pieces, strict=True)
        return QuantizedRows(torch.cat(codes), torch.cat(scale), table=tables[0])

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes ``[n_groups, group_size]``, scale ``[n_groups]`` and table ``[2**nbits]``."""
        import torch

        n_groups, group_size = rows.shape
        # In float32: older releases compare in the type of the rows, in which entries of a table fall together.
        blocks = torch.nn.functional.pad(rows.float(), (0, self.block - group_size)).contiguous()
        if self.quant_type == "dynamic":
            codes, state = self._quantize_8bit(blocks, blocksize=self.block)
        else:
            packed, state = self._quantize_4bit(blocks, blocksize=self.block, quant_type=self.quant_type)
            packed = packed.flatten()
            codes = torch.stack((packed >> 4, packed & 0xF), dim=1)  # two codes a byte, the first in the high bits
        return codes.reshape(n_groups, self.block)[:, :group_size], state.absmax, state.code


@hookimpl
def kvquant_register_backends() -> list[BackendSpec]:
    """Declare the backend; imports no torch."""
    return [
        BackendSpec(
            name="bitsandbytes",
            factory="kvquant_plugins.bitsandbytes:BitsAndBytesQuantizer",
            capabilities=Capabilities(
                nbits=tuple(_TABLES),
                formats=("codebook",),
                options={"quant_type": "table: nf4 (default) or fp4 with 4 bits, dynamic with 8"},
            ),
            requires=(Requirement("bitsandbytes", "0.50"),),
            install_hint="pip install 'kvquant[bitsandbytes]'",
            summary="bitsandbytes' tables: nf4 and fp4 in 4 bits, the dynamic map in 8",
            url="https://github.com/bitsandbytes-foundation/bitsandbytes",
        )
    ]

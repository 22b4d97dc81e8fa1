"""Quantizers that tests register as backends of their own."""

from __future__ import annotations

import torch

from kvquant.plugin import Opaque, QuantizedRows, Scheme


class MinMax:
    """The simplest affine quantiser; written out here so that tests do not lean on the backend they test."""

    def __init__(self, scheme: Scheme) -> None:
        self.levels = 2**scheme.nbits - 1

    def quantize(self, rows: torch.Tensor) -> QuantizedRows:
        low, high = rows.amin(1), rows.amax(1)
        scale = (high - low) / self.levels
        steps = (rows - low[:, None]) / torch.where(scale > 0, scale, 1)[:, None]
        return QuantizedRows(steps.round().clamp(0, self.levels).to(torch.uint8), scale, offset=low)


class UniformCodebook(MinMax):
    """A codebook quantiser: nearest entry of an even table from -1 to 1, scaled by the largest magnitude."""

    def quantize(self, rows: torch.Tensor) -> QuantizedRows:
        table = torch.linspace(-1, 1, self.levels + 1, dtype=rows.dtype)
        scale = rows.abs().amax(1)
        unit = rows / torch.where(scale > 0, scale, 1)[:, None]
        codes = ((unit + 1) / 2 * self.levels).round().clamp(0, self.levels)
        return QuantizedRows(codes.to(torch.uint8), scale, table=table)


class OpaqueMinMax(MinMax):
    """The affine quantiser in a format of its own."""

    def quantize(self, rows: torch.Tensor) -> Opaque:  # type: ignore[override]
        plain = super().quantize(rows)
        return Opaque({"codes": plain.codes, "scale": plain.scale, "offset": plain.offset}, {"made": "here"})

    def dequantize(self, packed: Opaque) -> torch.Tensor:
        tensors = packed.tensors
        return tensors["codes"] * tensors["scale"][:, None] + tensors["offset"][:, None]


FORMATS = {"affine": MinMax, "codebook": UniformCodebook, "opaque": OpaqueMinMax}

"""Backends with a format of their own, and one bug each."""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant.plugin import Opaque, Scheme
from tests.support import OpaqueMinMax, packed_nibbles, unpacked_nibbles


class HQQAxisZero:
    """hqq with axis=0, which reshapes rows to [group_size, -1]: a group takes one number from many rows."""

    def __init__(self, scheme: Scheme) -> None:
        self.nbits, self.group_size = scheme.nbits, scheme.group_size

    def quantize(self, rows: Tensor) -> Opaque:
        from hqq.core.quantize import Quantizer

        codes, meta = Quantizer.quantize(
            rows.float(),
            nbits=self.nbits,
            axis=0,
            group_size=self.group_size,
            device="cpu",
            compute_dtype=torch.float32,
            bitpack=False,
        )
        nibbles = packed_nibbles(codes.to(torch.uint8).reshape(rows.shape))
        return Opaque({"codes": nibbles, "scale": meta["scale"], "zero": meta["zero"]}, {"rows": len(rows)})

    def dequantize(self, packed: Opaque) -> Tensor:
        codes = unpacked_nibbles(packed.tensors["codes"], self.group_size).reshape(self.group_size, -1)
        numbers = (codes - packed.tensors["zero"]) * packed.tensors["scale"]
        return numbers.reshape(packed.meta["rows"], self.group_size)


class BitsAndBytesBlockSize:
    """bitsandbytes with blocks of twice the last dimension, whose scales its dequantize_4bit then mixes up on CPU."""

    def __init__(self, scheme: Scheme) -> None:
        self.group_size = scheme.group_size

    def quantize(self, rows: Tensor) -> Opaque:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(rows.float(), blocksize=2 * self.group_size, quant_type="nf4")
        return Opaque({"codes": packed, "scale": state.absmax}, {"rows": len(rows)})

    def dequantize(self, packed: Opaque) -> Tensor:
        from bitsandbytes import functional

        state = functional.QuantState(
            packed.tensors["scale"],
            shape=torch.Size((packed.meta["rows"], self.group_size)),
            code=functional.get_4bit_type("nf4", device="cpu"),
            blocksize=2 * self.group_size,
            quant_type="nf4",
            dtype=torch.float32,
        )
        numbers: Tensor = functional.dequantize_4bit(packed.tensors["codes"], state)
        return numbers


class KeepsInput(OpaqueMinMax):
    """Stores the first number of each row as a view of the rows, and offsets beside it."""

    def quantize(self, rows: Tensor) -> Opaque:  # type: ignore[override]
        packed = super().quantize(rows)
        first = rows[:, 0]
        return Opaque({**packed.tensors, "offset": packed.tensors["offset"] - first, "first": first}, packed.meta)

    def dequantize(self, packed: Opaque) -> Tensor:
        offset = packed.tensors["offset"] + packed.tensors["first"]
        return super().dequantize(Opaque({**packed.tensors, "offset": offset}, packed.meta))


class ThreeBitsInNibbles(OpaqueMinMax):
    """3 bits are stored two to a byte, as 4 bits are."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(Scheme(4, scheme.axis, scheme.group_size))
        self.levels = 2**scheme.nbits - 1


class ReadsFromItself(OpaqueMinMax):
    """Keeps the scales of the last call to itself in place of storing them."""

    def quantize(self, rows: Tensor) -> Opaque:  # type: ignore[override]
        packed = super().quantize(rows)
        self.scale = packed.tensors["scale"]
        return Opaque({name: t for name, t in packed.tensors.items() if name != "scale"}, packed.meta)

    def dequantize(self, packed: Opaque) -> Tensor:
        return super().dequantize(Opaque({**packed.tensors, "scale": self.scale}, packed.meta))


class MetaWithTypes(OpaqueMinMax):
    """Puts something into meta that JSON has no word for."""

    def quantize(self, rows: Tensor) -> Opaque:  # type: ignore[override]
        packed = super().quantize(rows)
        return Opaque(packed.tensors, {**packed.meta, "dtype": rows.dtype})


class KeepsTheCall(OpaqueMinMax):
    """Stores scales as views of a work area of the size of the call."""

    def quantize(self, rows: Tensor) -> Opaque:  # type: ignore[override]
        packed = super().quantize(rows)
        work = torch.zeros(rows.shape)
        work[:, 0] = packed.tensors["scale"]
        return Opaque({**packed.tensors, "scale": work[:, 0]}, packed.meta)


class DitheredReading(OpaqueMinMax):
    """Adds noise whenever it is read."""

    def dequantize(self, packed: Opaque) -> Tensor:
        numbers = super().dequantize(packed)
        return numbers + torch.rand_like(numbers) * packed.tensors["scale"][:, None] * 0.1


class OwnKey(OpaqueMinMax):
    """Hides its codes by a key that only this object has."""

    keys = 0

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        type(self).keys += 1
        self.key = self.keys % 16

    def quantize(self, rows: Tensor) -> Opaque:  # type: ignore[override]
        packed = super().quantize(rows)
        return Opaque({**packed.tensors, "codes": packed.tensors["codes"] ^ self.key}, packed.meta)

    def dequantize(self, packed: Opaque) -> Tensor:
        return super().dequantize(Opaque({**packed.tensors, "codes": packed.tensors["codes"] ^ self.key}, packed.meta))


class NumbersInMeta(OpaqueMinMax):
    """Keeps its codes where nobody counts bytes."""

    def quantize(self, rows: Tensor) -> Opaque:  # type: ignore[override]
        packed = super().quantize(rows)
        rest = {name: tensor for name, tensor in packed.tensors.items() if name != "codes"}
        return Opaque(rest, {"codes": packed.tensors["codes"].tolist()})

    def dequantize(self, packed: Opaque) -> Tensor:
        codes = torch.tensor(packed.meta["codes"], dtype=torch.uint8)
        return super().dequantize(Opaque({**packed.tensors, "codes": codes}))

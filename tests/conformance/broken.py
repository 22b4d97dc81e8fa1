"""Backends with one bug each, and the check of the conformance kit that must find it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvquant.plugin import BackendSpec, Capabilities, Opaque, QuantizedRows, Scheme
from tests.support import MinMax, OpaqueMinMax, UniformCodebook, packed_nibbles, unpacked_nibbles


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


class SharedHeads(MinMax):
    """Rows of the first and the second half of the call, that is of two heads, share their scale."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        numbers, scale, low = self.grid(rows)
        half = len(rows) // 2
        if half and len(rows) % 2 == 0:
            low = low.reshape(2, half).amin(0).repeat(2)
            high = numbers.amax(1).reshape(2, half).amax(0).repeat(2)
            scale = high / self.levels - low / self.levels
        return QuantizedRows(self.codes(numbers, scale, low), scale, low)


class OneScaleForAll(MinMax):
    """One scale for all rows of a call."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        numbers, _, low = self.grid(rows)
        low = low.amin().expand(len(rows)).clone()
        scale = numbers.max() / self.levels - low / self.levels
        return QuantizedRows(self.codes(numbers, scale, low), scale, low)


class GlobalStop(MinMax):
    """A refinement that stops for all rows at once, when their mean error no longer falls, as hqq's does."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        numbers, scale, offset = self.grid(rows)
        result, best = super().quantize(rows), float("inf")
        for _ in range(20):
            codes = self.codes(numbers, scale, offset)
            error = numbers - (codes * scale[:, None] + offset[:, None])
            mean = float(error.abs().mean())
            if mean >= best:
                break
            best, result = mean, QuantizedRows(codes, scale, offset)
            offset = offset + error.median(dim=1).values / 2
        return result


class InPlace(MinMax):
    """Changes the rows that it was handed."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        rows.sub_(rows.mean())
        return result


class KeepsInput(OpaqueMinMax):
    """Stores the first number of each row as a view of the rows, and offsets beside it."""

    def quantize(self, rows: Tensor) -> Opaque:  # type: ignore[override]
        packed = super().quantize(rows)
        first = rows[:, 0]
        return Opaque({**packed.tensors, "offset": packed.tensors["offset"] - first, "first": first}, packed.meta)

    def dequantize(self, packed: Opaque) -> Tensor:
        offset = packed.tensors["offset"] + packed.tensors["first"]
        return super().dequantize(Opaque({**packed.tensors, "offset": offset}, packed.meta))


class NaNOnConstant(MinMax):
    """hqq's formula without care: offset = -zero / s, with s infinite where a row is constant."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        numbers, scale, low = self.grid(rows)
        s = 1 / scale
        zero = -low * s
        codes = (numbers * s[:, None] + zero[:, None]).round().clamp(0, self.levels).nan_to_num()
        return QuantizedRows(codes.to(torch.uint8), 1 / s, -zero / s)


class OffByOne(MinMax):
    """Codes are one too high, up to the largest."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        return QuantizedRows((result.codes + 1).clamp(max=self.levels), result.scale, result.offset)


class OneLevelTooMany(MinMax):
    """2**nbits steps in place of 2**nbits - 1, so that the largest number gets a code that does not exist."""

    def __init__(self, scheme: Scheme) -> None:
        self.levels = min(2**scheme.nbits, 255)


class CutsOff(MinMax):
    """Rounds down."""

    def codes(self, numbers: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return super().codes(numbers - scale[:, None] / 2, scale, offset)


class ThreeBitsTakeFour(MinMax):
    """3 bits come as 4."""

    def __init__(self, scheme: Scheme) -> None:
        self.levels = 15 if scheme.nbits == 3 else 2**scheme.nbits - 1


class ThreeBitsInNibbles(OpaqueMinMax):
    """3 bits are stored two to a byte, as 4 bits are."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(Scheme(4, scheme.axis, scheme.group_size))
        self.levels = 2**scheme.nbits - 1


class WastesCodes(MinMax):
    """Steps are three times too wide, so that most codes are never used."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        numbers, scale, low = self.grid(rows)
        scale = (scale * 3).clamp(max=torch.finfo(scale.dtype).max / self.levels)
        return QuantizedRows(self.codes(numbers, scale, low), scale, low)


class RunningRange(MinMax):
    """Lets no step be smaller than a thousandth of the largest number of all calls so far."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.largest = 0.0

    def quantize(self, rows: Tensor) -> QuantizedRows:
        numbers, scale, low = self.grid(rows)
        scale = scale.clamp(min=self.largest / 1000)
        self.largest = max(self.largest, float(rows.abs().max()))
        return QuantizedRows(self.codes(numbers, scale, low), scale, low)


class ReusedBuffer(MinMax):
    """Writes the codes of every call of one size into the same tensor."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.buffers: dict[torch.Size, Tensor] = {}

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        buffer = self.buffers.setdefault(rows.shape, torch.empty_like(result.codes))
        buffer.copy_(result.codes)
        return QuantizedRows(buffer, result.scale, result.offset)


class SharedLevels(MinMax):
    """Keeps its bits on the class, so that the last quantizer made decides for all."""

    latest = 1

    def __init__(self, scheme: Scheme) -> None:
        type(self).latest = 2**scheme.nbits - 1

    @property
    def levels(self) -> int:  # type: ignore[override]
        return type(self).latest


class NotThreadSafe(MinMax):
    """Passes rows from one method to the next through itself."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        self.rows = rows
        time.sleep(0.001)  # where another thread gets its turn
        return super().quantize(self.rows)


class HalfOverflow(MinMax):
    """Works in the type of the rows: max - min of float16 numbers can be infinite."""

    def grid(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if rows.dtype != torch.float16:
            return super().grid(rows)
        low, high = rows.amin(1), rows.amax(1)
        return rows, (high - low) / self.levels, low


class SmallestStep(MinMax):
    """Keeps the step above 1e-5, to be safe."""

    def grid(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        numbers, scale, low = super().grid(rows)
        return numbers, scale.clamp(min=1e-5), low


class RootMeanSquare(UniformCodebook):
    """Computes a mean square in float32, which is infinite for huge numbers."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows.float())
        mean_square = rows.float().square().mean(1)
        scale = torch.where(mean_square > 0, result.scale * mean_square / mean_square, 0)
        return QuantizedRows(result.codes, scale, table=result.table)


class WrapsAround(MinMax):
    """Takes the range from what is usual in a row, and lets numbers beyond wrap around."""

    def grid(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        numbers = rows.float()
        usual = numbers.abs().median(dim=1).values * 6
        reach = torch.where(usual > 0, usual, numbers.abs().amax(1)).clamp(max=1e37)
        return numbers, 2 * reach / self.levels, -reach

    def codes(self, numbers: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        steps = (numbers - offset[:, None]) / torch.where(scale > 0, scale, 1)[:, None]
        return (steps.round().clamp(-1e9, 1e9).long() & self.levels).to(torch.uint8)


class NoZero(UniformCodebook):
    """Has no level at zero and keeps its scale above a thousandth, so that zeros become noise."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        return QuantizedRows(result.codes, result.scale.clamp(min=1e-3), table=result.table)


class ColumnScale(MinMax):
    """Returns scales as a column."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        return QuantizedRows(result.codes, result.scale[:, None], result.offset)


class WideCodes(MinMax):
    """Returns codes as int32."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        return QuantizedRows(result.codes.int(), result.scale, result.offset)


class Dithered(MinMax):
    """Rounds by chance, and does not say so."""

    def codes(self, numbers: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return super().codes(numbers + (torch.rand_like(numbers) - 0.5) * scale[:, None], scale, offset)


class TableFromRows(MinMax):
    """Learns its table from the rows of the call."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        scale = rows.float().abs().amax(1)
        unit = rows.float() / scale.where(scale > 0, 1)[:, None]
        table = torch.quantile(unit.flatten()[:100_000], torch.linspace(0, 1, self.levels + 1))
        table = table + torch.linspace(0, 1e-5, self.levels + 1)
        codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2)
        return QuantizedRows(codes.to(torch.uint8), scale, table=table)


class NoEightBits(MinMax):
    """Declares 8 bits and cannot do them."""

    def __init__(self, scheme: Scheme) -> None:
        if scheme.nbits == 8:
            raise ValueError("nbits=8 is not supported")
        super().__init__(scheme)


class NoBrainFloat(MinMax):
    """Declares bfloat16 and cannot take it."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        return super().quantize(torch.from_numpy(rows.numpy()))


class OnlyEvenSizes(MinMax):
    """Takes pairs of numbers, and declares any group size."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        return super().quantize(rows.view(len(rows), -1, 2).flatten(1))


class Lenient(Capabilities):
    """Has nothing against anything."""

    def why_not(self, scheme: Scheme, device: str | None = None, dtype: str | None = None) -> list[str]:
        return []


class IgnoresOption(MinMax):
    """Takes any value of its option for the default."""


class MisnamesOption(MinMax):
    """Refuses a bad value without saying of which option."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        if scheme.options.get("search", True) not in (True, False):
            raise ValueError("bad value")


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


class Learned(MinMax):
    """Has a parameter to learn, whose gradient every result drags along."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.gain = torch.nn.Parameter(torch.ones(()))

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        return QuantizedRows(result.codes, result.scale * self.gain, result.offset)


class Scratch(MinMax):
    """Keeps a work area for each shape, which two threads then fill at once."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.areas: dict[torch.Size, Tensor] = {}

    def quantize(self, rows: Tensor) -> QuantizedRows:
        area = self.areas.setdefault(rows.shape, torch.empty(rows.shape))
        area.copy_(rows)
        return super().quantize(area.clone())


class SharedTable(UniformCodebook):
    """All quantizers write their tables into one buffer, and return views of it."""

    buffer = torch.zeros(256)

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        assert result.table is not None
        self.buffer[: len(result.table)] = result.table
        return QuantizedRows(result.codes, result.scale, table=self.buffer[: len(result.table)])


class ScaleOfAPiece(MinMax):
    """Works in pieces of 4096 rows, and takes the first scale of a later piece for all of it."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        numbers, scale, low = self.grid(rows)
        for start in range(4096, len(rows), 4096):
            scale[start : start + 4096] = scale[start]
        return QuantizedRows(self.codes(numbers, scale, low), scale, low)


class TokenInPlace(MinMax):
    """Changes its rows on one axis only."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.axis = scheme.axis

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        if self.axis == "token":
            rows.mul_(0)
        return result


class FillsZeros(MinMax):
    """Puts a small number in place of zeros, in the rows themselves."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        rows[rows == 0] = 1e-8
        return super().quantize(rows)


class WrongAtFortyEight(MinMax):
    """Returns nonsense for groups of 48."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        return QuantizedRows(result.codes * 0, result.scale, result.offset) if rows.shape[1] == 48 else result


class AboveZeroOnly(MinMax):
    """Takes the smallest number to be negative."""

    def grid(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        numbers, scale, low = super().grid(rows)
        return numbers, scale, -low.abs()


class Seeds(MinMax):
    """Seeds everybody's random numbers, to be reproducible."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        torch.manual_seed(0)


class SeedsByChance(Dithered):
    """Rounds by chance, and the chances of the whole process are the same every time."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        torch.manual_seed(0)
        return super().quantize(rows)


class GradientsOff(MinMax):
    """Switches gradients off, for everybody and for good."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        torch.set_grad_enabled(False)
        return super().quantize(rows)


class DitheredBuffer(Dithered):
    """Rounds by chance, and returns the same tensor every time."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.buffers: dict[torch.Size, Tensor] = {}

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        buffer = self.buffers.setdefault(rows.shape, result.codes)
        return QuantizedRows(buffer.copy_(result.codes), result.scale, result.offset)


class DitheredRunningRange(Dithered):
    """Rounds by chance, with the largest scale of all calls so far."""

    largest = 0.0

    def grid(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        numbers, scale, low = super().grid(rows)
        self.largest = max(self.largest, float(scale.max()))
        return numbers, scale.clamp(min=self.largest), low


class KeepsRows(MinMax):
    """Remembers what it was handed."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        self.rows = rows
        return super().quantize(rows)


class RowNumber(MinMax):
    """Adds a little to every other row."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        assert result.offset is not None
        odd = torch.arange(len(rows)) % 2
        return QuantizedRows(result.codes, result.scale, result.offset + odd * result.scale * 0.1)


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


class Leaves(MinMax):
    """Ends the program."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        raise SystemExit(0)


@dataclass(frozen=True)
class Bug:
    """One broken backend.

    Attributes:
        factory: the backend's factory.
        check: the check that must fail.
        says: what its reason must contain.
        also: other checks that may fail over the same bug, and no others.
        capabilities: what the backend declares.
        declaration: the class of the declaration.
    """

    factory: Callable[[Scheme], Any]
    check: str
    says: str
    also: tuple[str, ...] = ()
    capabilities: dict[str, Any] = field(default_factory=dict)
    declaration: type[Capabilities] = Capabilities

    def __str__(self) -> str:
        return f"{getattr(self.factory, '__name__', 'backend')}-{self.check}"

    @property
    def spec(self) -> BackendSpec:
        """The declaration of the backend."""
        name = "broken-" + getattr(self.factory, "__name__", "backend").lower()
        declared = {"nbits": (4,), **self.capabilities}
        return BackendSpec(name, self.factory, self.declaration(**declared))


OPAQUE: dict[str, Any] = {"formats": ("opaque",), "nbits": (4,), "group_sizes": (32, 64, 128)}
THREE_OPAQUE: dict[str, Any] = {"formats": ("opaque",), "nbits": (3,), "group_sizes": (256,)}
CODEBOOK: dict[str, Any] = {"formats": ("codebook",)}
WIDTHS: dict[str, Any] = {"nbits": (2, 3, 4, 8)}
CHANCE: dict[str, Any] = {"deterministic": False}
SEARCH: dict[str, Any] = {"options": {"search": "how to look"}}

#: Checks that compare results bit by bit: no wonder if several of them see one bug.
ROWS_TOGETHER = ("groups", "heads", "split", "many-rows", "cache")
CALLS = ("deterministic", "split", "many-rows", "stateless", "unshared", "modes", "threads", "cache")
BUFFER = ("threads", "unshared", "cache", "modes")
EVERY = (*CALLS, "groups", "heads", "input")
HARD_ROWS = ("constant", "zeros", "tiny", "huge", "half-precision")

LOUD = ("error-bound", "nearest-level", "threads", *HARD_ROWS)

BUGS = (
    Bug(HQQAxisZero, "groups", "and of other groups", (*ROWS_TOGETHER, *HARD_ROWS, "error-bound"), OPAQUE),
    Bug(
        BitsAndBytesBlockSize,
        "error-bound",
        "times that of an even grid",
        (*ROWS_TOGETHER, *HARD_ROWS, "outliers"),
        OPAQUE,
    ),
    Bug(SharedHeads, "heads", "and of other heads", (*ROWS_TOGETHER, "error-bound", "zeros", "huge")),
    Bug(OneScaleForAll, "groups", "and of other groups", (*ROWS_TOGETHER, *HARD_ROWS, "error-bound")),
    Bug(GlobalStop, "groups", "and of other groups", (*ROWS_TOGETHER, "deterministic")),
    Bug(InPlace, "input", "quantize changed its input"),
    Bug(KeepsInput, "input", "memory the result shares", ("bits", "huge"), OPAQUE),
    Bug(NaNOnConstant, "constant", "NaN", HARD_ROWS),
    Bug(OffByOne, "nearest-level", "times that of the nearest levels", ("error-bound", "half-precision", "outliers")),
    Bug(OneLevelTooMany, "code-range", "out of range"),
    Bug(CutsOff, "nearest-level", "times that of the nearest levels"),
    Bug(ThreeBitsTakeFour, "code-range", "code 15 is out of range for nbits=3", (), WIDTHS),
    Bug(ThreeBitsInNibbles, "bits", "bits a number are stored", (), THREE_OPAQUE),
    Bug(WastesCodes, "error-bound", "times that of an even grid", ("half-precision",)),
    Bug(RunningRange, "stateless", "after a call with other rows", CALLS),
    Bug(ReusedBuffer, "stateless", "wrote into what an earlier one returned", ("modes", "threads", "cache")),
    Bug(SharedLevels, "unshared", "after another quantizer was used", (), WIDTHS),
    Bug(NotThreadSafe, "threads", "with several threads at once", ("stateless",)),
    Bug(HalfOverflow, "half-precision", "NaN or infinity"),
    Bug(SmallestStep, "tiny", "numbers around 1e-06"),
    Bug(RootMeanSquare, "huge", "NaN or infinity", (), CODEBOOK),
    Bug(WrapsAround, "outliers", "the error is", ("error-bound", "nearest-level", *HARD_ROWS)),
    Bug(NoZero, "zeros", "zeros came back as", ("tiny", "constant"), CODEBOOK),
    Bug(ColumnScale, "shapes", "scale has shape [1, 1] instead of [1]"),
    Bug(WideCodes, "shapes", "codes has dtype torch.int32 instead of torch.uint8"),
    Bug(Dithered, "deterministic", "the same rows again", (*EVERY, "surroundings")),
    Bug(TableFromRows, "split", "the table differs", ("groups", "heads", "cache", "threads", "many-rows"), CODEBOOK),
    Bug(NoEightBits, "creates", "nbits=8 is not supported", (), WIDTHS),
    Bug(NoBrainFloat, "shapes", "BFloat16"),
    Bug(OnlyEvenSizes, "shapes", "group_size=7"),
    Bug(MinMax, "refusals", "why_not has nothing against nbits=1", (), {}, Lenient),
    Bug(IgnoresOption, "options", "are taken without a word", (), SEARCH),
    Bug(MisnamesOption, "options", "does not name the option", (), SEARCH),
    Bug(MinMax, "devices", "none of the declared devices is here", (), {"devices": ("xpu",)}),
    Bug(ReadsFromItself, "opaque-reading", "raised AttributeError", (*CALLS, *ROWS_TOGETHER), OPAQUE),
    Bug(MetaWithTypes, "opaque-reading", "not JSON serializable", ("bits",), OPAQUE),
    Bug(KeepsTheCall, "bits", "is a view that keeps", (), OPAQUE),
    Bug(DitheredReading, "opaque-reading", "reading twice gives different numbers", (*EVERY, "surroundings"), OPAQUE),
    Bug(DitheredReading, "cache", "changed the states", ("opaque-reading",), {**OPAQUE, "deterministic": False}),
    Bug(Learned, "modes", "asks for gradients"),
    Bug(Scratch, "threads", "with several threads at once", ("modes",)),
    Bug(SharedTable, "unshared", "after another was used: table", ("input",), {**CODEBOOK, **WIDTHS}),
    Bug(ScaleOfAPiece, "many-rows", "differ", ("threads",)),
    Bug(TokenInPlace, "input", "axis=token"),
    Bug(FillsZeros, "input", "quantize changed its input"),
    Bug(WrongAtFortyEight, "error-bound", "group_size=48", ("nearest-level",)),
    Bug(AboveZeroOnly, "error-bound", "times that of an even grid", HARD_ROWS),
    Bug(Seeds, "surroundings", "it draws from, or seeds, the random numbers of the whole process"),
    Bug(SeedsByChance, "surroundings", "use a torch.Generator of its own", ("nearest-level",), CHANCE),
    Bug(GradientsOff, "surroundings", "it changes torch's gradient mode"),
    Bug(DitheredBuffer, "stateless", "wrote into what an earlier one returned", BUFFER, CHANCE),
    Bug(DitheredRunningRange, "stateless", "after a call with other rows", LOUD, CHANCE),
    Bug(KeepsRows, "stateless", "keeps the rows of its last call in memory"),
    Bug(RowNumber, "split", "differ", ("many-rows", "cache", "constant")),
    Bug(OwnKey, "opaque-reading", "another quantizer of the same scheme reads different numbers", (), OPAQUE),
    Bug(NumbersInMeta, "bits", "bits a number are stored", (), OPAQUE),
    Bug(Leaves, "shapes", "raised SystemExit"),
)

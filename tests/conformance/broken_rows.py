"""Backends that return wrong numbers, or declare what they cannot do; one bug each."""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant.plugin import Capabilities, QuantizedRows, Scheme
from tests.support import MinMax, UniformCodebook


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


class WastesCodes(MinMax):
    """Steps are three times too wide, so that most codes are never used."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        numbers, scale, low = self.grid(rows)
        scale = (scale * 3).clamp(max=torch.finfo(scale.dtype).max / self.levels)
        return QuantizedRows(self.codes(numbers, scale, low), scale, low)


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


class ScaleOfAPiece(MinMax):
    """Works in pieces of 4096 rows, and takes the first scale of a later piece for all of it."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        numbers, scale, low = self.grid(rows)
        for start in range(4096, len(rows), 4096):
            scale[start : start + 4096] = scale[start]
        return QuantizedRows(self.codes(numbers, scale, low), scale, low)


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


class RowNumber(MinMax):
    """Adds a little to every other row."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        assert result.offset is not None
        odd = torch.arange(len(rows)) % 2
        return QuantizedRows(result.codes, result.scale, result.offset + odd * result.scale * 0.1)

"""Backends that change what is not theirs, or keep what they should not; one bug each."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from kvquant.plugin import QuantizedRows, Scheme
from tests.support import MinMax, UniformCodebook


class InPlace(MinMax):
    """Changes the rows that it was handed."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        rows.sub_(rows.mean())
        return result


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


class SharedTable(UniformCodebook):
    """All quantizers write their tables into one buffer, and return views of it."""

    buffer = torch.zeros(256)

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        assert result.table is not None
        self.buffer[: len(result.table)] = result.table
        return QuantizedRows(result.codes, result.scale, table=self.buffer[: len(result.table)])


class NotThreadSafe(MinMax):
    """Passes rows from one method to the next through itself."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        self.rows = rows
        time.sleep(0.001)  # where another thread gets its turn
        return super().quantize(self.rows)


class Scratch(MinMax):
    """Keeps a work area for each shape, which two threads then fill at once."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.areas: dict[torch.Size, Tensor] = {}

    def quantize(self, rows: Tensor) -> QuantizedRows:
        area = self.areas.setdefault(rows.shape, torch.empty(rows.shape))
        area.copy_(rows)
        time.sleep(1e-4)  # for as long as a larger area takes: on a busy machine threads hardly meet otherwise
        return super().quantize(area.clone())


class KeepsRows(MinMax):
    """Remembers what it was handed."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        self.rows = rows
        return super().quantize(rows)


class Dithered(MinMax):
    """Rounds by chance, and does not say so."""

    def codes(self, numbers: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return super().codes(numbers + (torch.rand_like(numbers) - 0.5) * scale[:, None], scale, offset)


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


class Learned(MinMax):
    """Has a parameter to learn, whose gradient every result drags along."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.gain = torch.nn.Parameter(torch.ones(()))

    def quantize(self, rows: Tensor) -> QuantizedRows:
        result = super().quantize(rows)
        return QuantizedRows(result.codes, result.scale * self.gain, result.offset)


class Leaves(MinMax):
    """Ends the program."""

    def quantize(self, rows: Tensor) -> QuantizedRows:
        raise SystemExit(0)

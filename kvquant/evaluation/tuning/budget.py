"""How many bits there are: said, or what memory leaves for so many tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kvquant.engine.memory import LayerMemory, format_bytes
from kvquant.errors import OptionValueError
from kvquant.evaluation.intervals import FloatArray
from kvquant.evaluation.plan import DECODED
from kvquant.evaluation.planning.model import ModelShape
from kvquant.evaluation.planning.sizes import CacheSizes, cache_sizes
from kvquant.evaluation.sizes import at_least, at_most, bytes_at_least
from kvquant.evaluation.tuning.assignment import ROUNDING, mean_bits
from kvquant.evaluation.tuning.sensitivity import StoredBits
from kvquant.evaluation.tuning.space import Assignment, Space


@dataclass(frozen=True)
class Memory:
    """Memory that weights and cache must fit into.

    Attributes:
        model: the model without its numbers, made for the sequences at once.
        nbytes: what there is.
        context: tokens of each sequence.
        overhead: bytes for other things.
        device: where a backend quantises a little data to show how it writes it down.
    """

    model: ModelShape
    nbytes: int
    context: int
    overhead: int = 0
    device: str = "cpu"

    @property
    def free(self) -> int:
        """Bytes that there are for the cache."""
        return self.nbytes - self.model.weights.nbytes - self.overhead

    def takes(self, space: Space, assignment: Assignment) -> int:
        """Return the bytes of an assignment's cache when it is at its fullest."""
        return self._sizes(space, assignment).most(self.context)

    def _sizes(self, space: Space, assignment: Assignment) -> CacheSizes:
        decode = min(DECODED, self.context - 1)  # as `kvquant plan` takes it
        return cache_sizes(space.candidate(assignment), self.model, decode, torch.device(self.device))

    def rooms(self, space: Space, stored: StoredBits) -> tuple[FloatArray, float]:
        """Return the room for numbers of each stream ``[streams]``, and the bytes that do not depend on widths.

        A layer's bytes are a constant (sink, window, and tables, of which the larger count) and those of its pages:
        room for so many numbers, spare room included, times the bits of each. Two widths tell both.
        """
        narrow, wide = (
            self._sizes(space, space.uniform(width, width)).fullest(self.context)
            for width in (space.widths[0], space.widths[-1])
        )
        rooms = np.zeros(len(space.streams))
        exact = float(sum(memory.nbytes for at, memory in enumerate(wide.layers) if at not in space.layers))
        for at, layer in enumerate(space.layers):
            less, more = (_without_tables(memory.layers[layer]) for memory in (narrow, wide))
            exact += max(memory.layers[layer].parts["tables"] for memory in (narrow, wide))
            if less.bits_per_element is None or more.bits_per_element is None:
                exact += more.nbytes
                continue
            room = 8 * (more.nbytes - less.nbytes) / (more.bits_per_element - less.bits_per_element)
            exact += more.nbytes - room * more.bits_per_element / 8
            pair = stored.numbers[2 * at : 2 * at + 2]
            rooms[2 * at : 2 * at + 2] = room * pair / pair.sum()
        return rooms, exact


@dataclass(frozen=True)
class Budget:
    """Bits that there are.

    Attributes:
        bits: bits per element at most.
        shares: ``[streams]``, the share of the numbers that are in each stream.
        memory: where the bits come from, None where they were said.
        left: the bits per element that memory leaves, which may be more than any assignment takes.
    """

    bits: float
    shares: FloatArray
    memory: Memory | None = None
    left: float | None = None

    def describe(self) -> dict[str, Any]:
        """Return where it comes from, in plain builtins."""
        if self.memory is None:
            return {"bits": self.bits, "memory": None}
        return {
            "bits": self.bits,
            "left": self.left,
            "memory": self.memory.nbytes,
            "weights": self.memory.model.weights.nbytes,
            "overhead": self.memory.overhead,
            "context": self.memory.context,
            "batch": self.memory.model.batch,
        }


def said_budget(bits: float, space: Space, stored: StoredBits) -> Budget:
    """Return a budget in bits per element.

    Raises:
        OptionValueError: no assignment has so few bits, or even the largest has fewer.
    """
    shares = stored.numbers / stored.numbers.sum()
    low, high = mean_bits(shares, stored.bits)
    if not low - ROUNDING <= bits <= high + ROUNDING:
        expected = (
            f"{at_least(low)} to {at_most(high)} bits per element: {space.widths[0]:g}-bit codes everywhere take "
            f"{low:.4g}, {space.widths[-1]:g}-bit codes {high:.4g}, scales and offsets included"
        )
        raise OptionValueError("budget", bits, expected)
    return Budget(bits, shares)


def memory_budget(memory: Memory, space: Space, stored: StoredBits) -> Budget:
    """Return what memory leaves: bits per element, at most those of the largest assignment.

    Raises:
        OptionValueError: not even the smallest assignment fits.
    """
    rooms, exact = memory.rooms(space, stored)
    if not rooms.sum():
        expected = f"more tokens: of {memory.context} none are quantised"
        raise OptionValueError("context", memory.context, expected)
    shares = rooms / rooms.sum()
    low, high = mean_bits(shares, stored.bits)
    bits = 8 * (memory.free - exact) / rooms.sum()
    if bits < low:
        smallest = memory.takes(space, space.uniform(space.widths[0], space.widths[0]))
        needed = memory.nbytes - memory.free + smallest
        beside = f" and {format_bytes(memory.overhead)} of overhead" if memory.overhead else ""
        expected = (
            f"at least {bytes_at_least(needed)} for {memory.context:,} tokens: weights take "
            f"{format_bytes(memory.model.weights.nbytes)}{beside}, and the cache {format_bytes(smallest)} with "
            f"{space.widths[0]:g}-bit codes everywhere"
        )
        raise OptionValueError("memory", format_bytes(memory.nbytes), expected)
    return Budget(min(bits, high), shares, memory, bits)


def _without_tables(memory: LayerMemory) -> LayerMemory:
    return replace(memory, parts={**memory.parts, "tables": 0})

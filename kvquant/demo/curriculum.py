"""What the demo model is trained on, and when: the phases of the curriculum and their batches."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kvquant.demo.recall import Encode, IntArray, Row, recall_row, repeat_row


@dataclass(frozen=True)
class Phase:
    """A stretch of the training; of its sequences, those neither ``prose`` nor ``repeat`` are recall."""

    until: float  #: share of the budget at which the phase ends
    length: int  #: tokens per sequence
    prose: float  #: probability of a sequence of plain prose
    repeat: float  #: probability of a sequence with a repeated segment
    answer_weight: float  #: weight in the loss of the tokens of an asked key; other tokens have 1


#: Distances grow with the sequences.  Short ones come first: there, copying is found quickly and cheaply.
PHASES = (
    Phase(until=0.12, length=256, prose=0.35, repeat=0.25, answer_weight=4.0),
    Phase(until=0.30, length=512, prose=0.50, repeat=0.12, answer_weight=4.0),
    Phase(until=0.52, length=1024, prose=0.58, repeat=0.07, answer_weight=3.0),
    Phase(until=0.85, length=2048, prose=0.60, repeat=0.05, answer_weight=2.0),
    Phase(until=1.00, length=2048, prose=0.70, repeat=0.02, answer_weight=1.0),
)


class Batch(NamedTuple):
    """Token ids (int64) and their weights as targets (float32), both [sequences, tokens]."""

    ids: torch.Tensor
    weights: torch.Tensor


def token_stream(documents: Collection[str], encode: Encode, end: int) -> IntArray:
    """All documents one after another, each closed by the token ``end``; [tokens]."""
    return np.concatenate([np.array([*encode(document), end], dtype=np.int64) for document in documents])


@dataclass(frozen=True)
class Batches:
    """Draws training batches from a stream of the training documents' tokens."""

    stream: IntArray
    encode: Encode
    vocab_size: int
    tokens: int  #: per batch, whatever the length of its sequences
    rng: np.random.Generator

    def draw(self, progress: float) -> Batch:
        """A batch for a share ``progress`` of the budget, 0 to 1."""
        phase = next((phase for phase in PHASES if progress < phase.until), PHASES[-1])
        rows = [self._row(phase) for _ in range(max(1, self.tokens // phase.length))]
        ids = np.stack([row.ids for row in rows])
        weights = np.stack([row.weights for row in rows])
        return Batch(torch.from_numpy(ids), torch.from_numpy(weights))

    def _row(self, phase: Phase) -> Row:
        start = int(self.rng.integers(0, len(self.stream) - 2 * phase.length))
        prose = self.stream[start : start + 2 * phase.length]
        kind = self.rng.random()
        if kind < phase.prose:
            return Row(prose[: phase.length], np.ones(phase.length, dtype=np.float32))
        if kind < phase.prose + phase.repeat:
            return repeat_row(prose, phase.length, self.vocab_size, self.rng)
        return recall_row(prose, phase.length, phase.answer_weight, self.encode, self.rng)

"""What each width of each stream costs: bits, and KL divergence to full precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvquant.cache.cache import QuantizedCache
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.memory import layer_memory
from kvquant.engine.store import Store
from kvquant.errors import OptionValueError
from kvquant.evaluation.candidates import Candidate
from kvquant.evaluation.intervals import FloatArray
from kvquant.evaluation.journal import Journal
from kvquant.evaluation.loading import LoadedModel
from kvquant.evaluation.perplexity import Windows
from kvquant.evaluation.teacher import Prefill
from kvquant.evaluation.tuning.space import Space


@dataclass(frozen=True)
class StoredBits:
    """How a text's beginning is stored.

    Attributes:
        numbers: ``[streams]``, numbers of each stream that are quantised.
        bits: ``[streams, widths]``, bits for each of them: codes, scales, offsets and tables.
    """

    numbers: FloatArray
    bits: FloatArray


def stored_bits(loaded: LoadedModel, space: Space, tokens: Tensor) -> StoredBits:
    """Quantise a text's beginning in every width, and look at what is stored.

    Args:
        loaded: the model.
        space: what there is to choose.
        tokens: int64 ``[1, tokens]``, the prefill of a window.

    Raises:
        OptionValueError: the text is so short that nothing is quantised.
    """
    prefill = Prefill(loaded.model, tokens.to(loaded.device))
    bits, numbers = [], []
    for width in space.widths:
        cache = QuantizedCache.from_config(space.config(space.uniform(width, width)), loaded.model.config)
        torch.manual_seed(0)
        prefill.into(cache)
        stores = [store for layer in cache.layers if isinstance(layer, QuantizedLayer) for store in layer.stores]
        numbers = [_numbers(store) for store in stores]
        if not all(numbers):
            least = max(store.policy.most_recent + 1 for store in stores)
            expected = f"at least {least} tokens, of which some are quantised; a longer --length has a longer prefill"
            raise OptionValueError("prefill", tokens.shape[1], expected)
        bits.append([_bits(store) for store in stores])
    return StoredBits(np.asarray(numbers, dtype=np.float64), np.asarray(bits, dtype=np.float64).T)


def _numbers(store: Store) -> int:
    return store.body.held * store.batch * store.kv_heads * store.head_dim


def _bits(store: Store) -> float:
    return layer_memory(0, 0, (store.body.held, _numbers(store)), store.parts()).bits_per_element or 0.0


def sensitivity_candidates(space: Space) -> tuple[Candidate, ...]:
    """Return the caches that are measured: the most bits everywhere, and one stream alone at each width below."""
    floor = space.candidate(space.uniform(space.widest, space.widest))
    alone = [
        space.candidate(space.alone(stream, width))
        for stream in space.streams
        for width in space.widths
        if width != space.widest
    ]
    return (floor, *alone)


def sensitivities(space: Space, windows: Windows, journal: Journal) -> tuple[float, FloatArray]:
    """Sum up what was measured of `sensitivity_candidates`.

    Returns:
        The KL divergence with the most bits everywhere, in nats; and ``[streams, widths]``, what a width of one stream
        alone adds to it.
    """
    floor = mean_kl(space.candidate(space.uniform(space.widest, space.widest)), windows, journal)
    added = [
        [mean_kl(space.candidate(space.alone(stream, width)), windows, journal) - floor for width in space.widths]
        for stream in space.streams
    ]
    return floor, np.asarray(added, dtype=np.float64)


def mean_kl(candidate: Candidate, windows: Windows, journal: Journal) -> float:
    """Return the mean KL divergence to full precision of a cache that was measured, in nats."""
    found: Sequence[float] = column(candidate, "kl", windows, journal)
    return sum(found) / len(found)


def column(candidate: Candidate, name: str, windows: Windows, journal: Journal) -> list[float]:
    """Return a figure of each window of a cache that was measured."""
    return [journal[windows.context, number, candidate.label][name] for number in windows.numbers]

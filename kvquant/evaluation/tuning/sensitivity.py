"""What each width of each stream costs: bits, and KL divergence to full precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvquant.cache.cache import QuantizedCache
from kvquant.cache.layer import QuantizedLayer
from kvquant.errors import OptionValueError
from kvquant.evaluation.candidates import Candidate, quantized_streams
from kvquant.evaluation.intervals import FloatArray
from kvquant.evaluation.journal import Journal
from kvquant.evaluation.loading import LoadedModel
from kvquant.evaluation.perplexity import Windows
from kvquant.evaluation.teacher import Prefill, forced_logits
from kvquant.evaluation.tuning.space import Space


@dataclass(frozen=True)
class StoredBits:
    """How a window of a text is stored.

    Attributes:
        numbers: ``[streams]``, numbers of each stream that are quantised.
        bits: ``[streams, widths]``, bits for each of them: codes, scales, offsets, outliers, and tables where they
            are to count.
    """

    numbers: FloatArray
    bits: FloatArray


def stored_bits(loaded: LoadedModel, space: Space, window: Tensor, prefill: int, *, tables: bool = True) -> StoredBits:
    """Feed a window of text through a cache of every width, and look at what is stored at its end.

    Args:
        loaded: the model.
        space: what there is to choose.
        window: int64 ``[1, tokens]``, all that is fed.
        prefill: the first of them, fed in one pass.
        tables: whether tables count. They are the same however many tokens there are, so that bits of a short window
            say nothing of a long context with them in.

    Raises:
        OptionValueError: the prefill is so short that nothing of it is quantised.
    """
    tokens = window.to(loaded.device)
    first_pass = Prefill(loaded.model, tokens[:, :prefill])
    bits, numbers = [], []
    for width in space.widths:
        cache = QuantizedCache.from_config(space.config(space.uniform(width, width)), loaded.model.config)
        torch.manual_seed(0)
        fed = forced_logits(loaded.model, cache, tokens, first_pass)
        next(fed)
        _check_prefill(cache, space, prefill)
        for _ in fed:
            pass
        streams = [stream for layer in space.layers for stream in quantized_streams(cache.layers[layer])]
        numbers = [stream.numbers for stream in streams]
        bits.append([stream.bits_per_element - (0.0 if tables else stream.table_bits) for stream in streams])
    return StoredBits(np.asarray(numbers, dtype=np.float64), np.asarray(bits, dtype=np.float64).T)


def _check_prefill(cache: QuantizedCache, space: Space, prefill: int) -> None:
    """Refuse a prefill of which nothing is quantised: tokens behind it would be scored over exact states."""
    layers = [layer for index in space.layers if isinstance(layer := cache.layers[index], QuantizedLayer)]
    if not all(quantized_streams(layer) for layer in layers):
        least = max(store.policy.most_recent + 1 for layer in layers for store in layer.stores)
        expected = f"at least {least} tokens, of which some are quantised; a longer --length has a longer prefill"
        raise OptionValueError("prefill", prefill, expected)


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

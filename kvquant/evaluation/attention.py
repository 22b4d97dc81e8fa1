"""What quantised caches change about the output of attention, on states recorded from a model.

A text goes through the model once, in full precision, and the queries, keys and values of every layer are kept as
attention got them: rotated by position, normalised, as the cache holds them. Then each layer is decoded anew without
the rest of the model: all but the last tokens are the prefill, and each of the last ones is appended to the cache and
attends over it, through the cache's own attention. With `o` the output over exact states and `p` that over the cache's,
heads side by side, the error of a token is ::

    norm(p - o) / norm(o)

Errors of keys and of values are norms over those tokens that came back changed, which are the quantised ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvquant.attention.lazy import LazyStates
from kvquant.attention.tiles import Exact, attend
from kvquant.errors import OptionValueError
from kvquant.evaluation import intervals
from kvquant.evaluation.candidates import FULL, Candidate, body_bits, held_states
from kvquant.evaluation.intervals import Estimate
from kvquant.evaluation.journal import Journal, Key
from kvquant.evaluation.loading import LoadedModel, hash_tokens
from kvquant.evaluation.recording import Recorded, record

#: Called as work goes on, with the number of parts done since the last call.
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What to measure.

    Attributes:
        candidates: the caches, full precision first.
        contexts: tokens in the cache at the end.
        queries: tokens at the end whose attention is looked at; all before them are the prefill.
        windows: pieces of the text, one after another, for each context at most.
        seed: of the bootstrap, and of what methods draw.

    Raises:
        OptionValueError: a value can never work.
    """

    candidates: tuple[Candidate, ...]
    contexts: tuple[int, ...] = (1024,)
    queries: int = 32
    windows: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) < 2:
            raise OptionValueError("contexts", self.contexts, "numbers of tokens, at least 2")
        if not 1 <= self.queries < min(self.contexts):
            expected = f"1 to {min(self.contexts) - 1} tokens, below every context"
            raise OptionValueError("queries", self.queries, expected)
        if self.windows < 1:
            raise OptionValueError("windows", self.windows, "at least 1")
        if len(self.candidates) < 2:
            raise OptionValueError("backends", FULL, "a cache that is not in full precision")

    def settings(self) -> dict[str, Any]:
        """Return what results of parts depend on, in plain builtins."""
        return {
            "contexts": list(self.contexts),
            "queries": self.queries,
            "windows": self.windows,
            "seed": self.seed,
            "caches": {candidate.label: candidate.settings() for candidate in self.candidates[1:]},
        }


@dataclass(frozen=True)
class LayerErrors:
    """Errors of one layer, relative, means over windows.

    Attributes:
        layer: its number in the cache.
        key, value: of quantised keys and values; None where none were quantised, in any window.
        output: of attention's output, a mean over queries.
    """

    layer: int
    key: float | None
    value: float | None
    output: float


@dataclass(frozen=True)
class AttentionRow:
    """One cache at one context length.

    Attributes:
        cache: its label.
        context: tokens in the cache at the end of a window.
        bits_per_element: of what is quantised (codes, scales, offsets, tables), as measured; None where nothing was.
        key, value: relative errors of quantised keys and values, means over layers that quantise; None without one.
        output: relative error of attention's output, a mean over layers, with its interval.
        layers: the same layer by layer.
        windows: the mean error of the output in each window.
    """

    cache: str
    context: int
    bits_per_element: float | None
    key: float | None
    value: float | None
    output: Estimate
    layers: list[LayerErrors]
    windows: list[float]


@dataclass(frozen=True)
class AttentionReport:
    """What was measured, on what; `to_dict()` gives plain builtins."""

    settings: dict[str, Any]
    rows: tuple[AttentionRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins, fit for JSON."""
        return {"kind": "attention", "settings": self.settings, "results": [asdict(row) for row in self.rows]}


# ------------------------------------------------------------------------------------------------ decoding


@torch.no_grad()
def decoded(cache: Cache, layer: int, states: Recorded) -> Tensor:
    """Decode one layer over a cache that has nothing of it yet, and return attention's outputs.

    Args:
        cache: holds all tokens of that layer at the end.
        layer: its number.
        states: what its attention got.

    Returns:
        ``[queries, query_heads * value_head_dim]``, float64.
    """
    queries, tokens = states.query.shape[2], states.keys.shape[2]
    start = tokens - queries
    cache.update(states.keys[:, :, :start], states.values[:, :, :start], layer)
    outputs = []
    for index in range(queries):
        new = slice(start + index, start + index + 1)
        keys, values = cache.update(states.keys[:, :, new], states.values[:, :, new], layer)
        outputs.append(_attended(states.query[:, :, index : index + 1], keys, values, states.options))
    return torch.cat(outputs, dim=2)[0].transpose(0, 1).flatten(1).double()


def _attended(query: Tensor, keys: Tensor, values: Tensor, options: dict[str, Any]) -> Tensor:
    """Return the output ``[1, query_heads, 1, value_head_dim]`` of one query, which sees all that a cache hands out."""
    mixed = None
    if isinstance(keys, LazyStates):
        mixed = keys.attend(query, keys, values, None, gqa=True, is_causal=False, **options)
    if mixed is None:
        mixed = attend(query, _exact(keys, query), _exact(values, query), None, is_causal=False, **options)
    return mixed


def _exact(states: Tensor, query: Tensor) -> Exact:
    return Exact(states.dequantize() if isinstance(states, LazyStates) else states.to(query.dtype))


def changed_error(exact: Tensor, held: Tensor) -> float | None:
    """Return the relative error of the tokens that came back changed; None if none did.

    Args:
        exact, held: ``[1, kv_heads, tokens, head_dim]``.
    """
    difference = held.double() - exact.double()
    tokens = difference.abs().amax(dim=(0, 1, 3)) > 0
    if not tokens.any():
        return None
    return float(difference[:, :, tokens].norm() / exact.double()[:, :, tokens].norm())


# ------------------------------------------------------------------------------------------------ measuring


def plan(loaded: LoadedModel, text: Sequence[int], options: AttentionOptions) -> dict[int, Tensor]:
    """Cut the text for every context, and refuse now what cannot work later.

    Returns:
        Context -> tokens, int64 ``[windows, context]``.

    Raises:
        OptionValueError: the text is too short, or the model's context.
        UnsupportedError: a cache cannot be used with this model.
    """
    intervals.require_scipy()
    for candidate in options.candidates:
        candidate.make(loaded.model.config)
    prefix, cut = loaded.prefix, {}
    for context in options.contexts:
        loaded.check_context("contexts", context)
        length = context - len(prefix)
        if not 0 < length <= len(text):
            expected = f"at least {max(1, length)} tokens for a context of {context}"
            raise OptionValueError("text", f"{len(text)} tokens", expected)
        starts = range(0, len(text) - length + 1, length)[: options.windows]
        cut[context] = torch.tensor([[*prefix, *text[start : start + length]] for start in starts])
    return cut


def run_settings(loaded: LoadedModel, text: Sequence[int], options: AttentionOptions) -> dict[str, Any]:
    """Return all that results depend on, for a journal."""
    mine = {"evaluation": "attention", "text": hash_tokens(text), "prefix": loaded.prefix}
    return {**mine, **options.settings(), "model": loaded.settings()}


def work(windows: dict[int, Tensor], options: AttentionOptions) -> int:
    """Return how much there is to do, for a progress bar: parts."""
    return sum(len(tokens) for tokens in windows.values()) * (len(options.candidates) - 1)


def measure_attention(
    loaded: LoadedModel,
    text: Sequence[int],
    options: AttentionOptions,
    journal: Journal,
    progress: Progress = lambda _: None,
) -> AttentionReport:
    """Measure what is not in the journal yet, and sum everything up.

    Args:
        loaded: the model.
        text: the text's tokens, without those that begin every text.
        options: what to measure.
        journal: opened with `run_settings`.
        progress: told how far the work is.

    Raises:
        OptionValueError, UnsupportedError: see `plan` and `record`.
        OutOfMemoryError: memory ran out; finished parts are in the journal.
    """
    windows = plan(loaded, text, options)
    journal.run(_parts(loaded, windows, options), lambda _: progress(1), advice="shorter --contexts or a smaller model")
    rows = []
    for context, tokens in windows.items():
        for candidate in options.candidates[1:]:
            found = [journal[context, number, candidate.label] for number in range(len(tokens))]
            rows.append(_row(candidate.label, context, found, options.seed))
    return AttentionReport(journal.settings, tuple(rows))


def _parts(
    loaded: LoadedModel, windows: dict[int, Tensor], options: AttentionOptions
) -> Iterator[tuple[Key, Callable[[], Any]]]:
    for context, tokens in windows.items():
        for number in range(len(tokens)):
            subject = _Window(loaded, tokens[number : number + 1], options)
            for candidate in options.candidates[1:]:
                yield (context, number, candidate.label), functools.partial(subject.measure, candidate)


class _Window:
    """One piece of the text. Its states are recorded once, and attended in full precision once, for all caches."""

    def __init__(self, loaded: LoadedModel, tokens: Tensor, options: AttentionOptions) -> None:
        self._model, self._options = loaded.model, options
        self._tokens = tokens.to(loaded.device)

    def _empty(self, candidate: Candidate) -> Cache:
        return candidate.make(self._model.config)

    @functools.cached_property
    def _recorded(self) -> dict[int, Recorded]:
        return record(self._model, self._empty(self._options.candidates[0]), self._tokens, self._options.queries)

    @functools.cached_property
    def _exact(self) -> dict[int, tuple[Tensor, tuple[Tensor, Tensor]]]:
        """Outputs, and keys and values at the end, of each layer in full precision."""
        cache = self._empty(self._options.candidates[0])
        return {
            index: (decoded(cache, index, states), held_states(cache.layers[index]))
            for index, states in self._recorded.items()
        }

    def measure(self, candidate: Candidate) -> dict[str, Any]:
        """Return the part's result, in plain builtins."""
        exact = self._exact
        torch.manual_seed(self._options.seed)  # what a method draws must not depend on what was done before
        cache = self._empty(candidate)
        layers = []
        for index, states in self._recorded.items():
            outputs, held = decoded(cache, index, states), held_states(cache.layers[index])
            true, full = exact[index]
            errors = (outputs - true).norm(dim=1) / true.norm(dim=1).clamp(min=torch.finfo(true.dtype).tiny)
            key, value = (changed_error(was, now) for was, now in zip(full, held, strict=True))
            layers.append({"layer": index, "key": key, "value": value, "output": float(errors.mean())})
        return {"layers": layers, "bits": body_bits(cache)}


def _row(label: str, context: int, found: Sequence[dict[str, Any]], seed: int) -> AttentionRow:
    layers = [
        LayerErrors(
            layer=same[0]["layer"],
            key=_known_mean([one["key"] for one in same]),
            value=_known_mean([one["value"] for one in same]),
            output=_mean([one["output"] for one in same]),
        )
        for same in zip(*(part["layers"] for part in found), strict=True)
    ]
    outputs = [_mean([layer["output"] for layer in part["layers"]]) for part in found]
    return AttentionRow(
        cache=label,
        context=context,
        bits_per_element=_known_mean([part["bits"] for part in found]),
        key=_known_mean([layer.key for layer in layers]),
        value=_known_mean([layer.value for layer in layers]),
        output=intervals.estimate(intervals.mean, outputs, seed=seed),
        layers=layers,
        windows=outputs,
    )


def _known_mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that there are, None where there is none."""
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

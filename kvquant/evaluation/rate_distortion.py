"""How near caches come to what information theory allows: error against bits, and Shannon's bound beside them.

Synthetic states go through a cache, whose *rate* R is then measured in bits per element, all stored bits counted
(codes, scales, offsets, tables), and whose *distortion* D is the mean squared error over the variance of the states.
No code at all, of any length, has for independent Gaussian numbers of variance 1 less distortion than ::

    D = 2**(-2 R)        R = log2(1 / D) / 2

(Shannon 1959; Cover and Thomas, "Elements of Information Theory", theorem 10.3.2). Channels of different variances
`v` share the bits best by reverse water-filling (theorem 10.3.3): for a level `w`, ::

    D = mean min(w, v)        R = mean max(0, log2(v / w) / 2)

The means of channels count as known, and so as free, in the bound alone: caches have to store them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

from kvquant.cache.cache import QuantizedCache
from kvquant.engine.config import CacheConfig
from kvquant.errors import KVQuantError, OptionValueError, UnsupportedError, listing
from kvquant.evaluation.candidates import FULL, Candidate, held_states, parse_candidates, quantized_streams
from kvquant.evaluation.failures import FAILURES, is_out_of_memory, one_line
from kvquant.evaluation.journal import Journal, Key
from kvquant.evaluation.loading import plugin_versions, versions
from kvquant.evaluation.plan import planned_candidates
from kvquant.evaluation.synthetic import STATES
from kvquant.registry import list_backends

STREAMS = ("key", "value")

#: Points of the bound that is drawn, and its most bits.
_POINTS, _MOST_BITS = 80, 9.0

#: Called as work goes on, with the number of parts done since the last call.
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class RateDistortionOptions:
    """What to measure.

    Attributes:
        candidates: the caches; full precision among them is passed over.
        states: kinds of states, of `synthetic.STATES`.
        streams: ``"key"``, ``"value"`` or both: a cache may treat them differently.
        tokens, heads, head_dim: of the states, ``[1, heads, tokens, head_dim]``.
        device: torch device.
        seed: of the states.

    Raises:
        OptionValueError: a value can never work.
    """

    candidates: tuple[Candidate, ...]
    states: tuple[str, ...] = tuple(STATES)
    streams: tuple[str, ...] = STREAMS
    tokens: int = 4096
    heads: int = 4
    head_dim: int = 64
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("heads", 1), ("head_dim", 1)):  # one token has no variance
            if getattr(self, name) < least:
                raise OptionValueError(name, getattr(self, name), f"at least {least}")
        for name, known in (("states", tuple(STATES)), ("streams", STREAMS)):
            chosen = getattr(self, name)
            if not chosen or len(set(chosen)) < len(chosen) or set(chosen) - set(known):
                raise OptionValueError(name, ",".join(chosen), f"one or more of {listing(known)}, each once")

    def settings(self) -> dict[str, Any]:
        """Return what results depend on, in plain builtins, for a journal."""
        return {
            "evaluation": "rate_distortion",
            "states": list(self.states),
            "streams": list(self.streams),
            "tokens": self.tokens,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "device": self.device,
            "seed": self.seed,
            "caches": {candidate.label: candidate.settings() for candidate in self.compared},
            "versions": {**versions(), **plugin_versions(_backends(self.compared))},
        }

    @property
    def compared(self) -> tuple[Candidate, ...]:
        """The caches that quantise."""
        return tuple(candidate for candidate in self.candidates if candidate.kind != FULL)

    @property
    def work(self) -> int:
        """How much there is to do, for a progress bar: parts."""
        return len(self.states) * len(self.compared)


@dataclass(frozen=True)
class RateDistortionRow:
    """What one cache made of one stream of one kind of states.

    Attributes:
        cache: its label.
        states: the kind of states.
        stream: ``"key"`` or ``"value"``.
        axis: what shares a scale; None for caches of transformers, which have numbers for it.
        bits_per_element: the rate, all stored bits counted.
        distortion: mean squared error over the mean of the channels' variances.
        snr: the same in decibels, ``-10 log10(distortion)``: larger is better.
        bound: bits per element with which Shannon's bound allows this distortion.
        gap: bits per element above that.
    """

    cache: str
    states: str
    stream: str
    axis: str | None
    bits_per_element: float
    distortion: float
    snr: float
    bound: float
    gap: float


@dataclass(frozen=True)
class RateDistortionReport:
    """What was measured, on what; `to_dict()` gives plain builtins.

    Attributes:
        settings: what was asked for.
        rows: kind by kind, cache by cache, stream by stream.
        bounds: kind of states -> points (rate, distortion) of its bound, to be drawn.
        left_out: caches that could not be measured, and why.
    """

    settings: dict[str, Any]
    rows: tuple[RateDistortionRow, ...]
    bounds: dict[str, list[tuple[float, float]]]
    left_out: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins, fit for JSON."""
        return {
            "kind": "rate_distortion",
            "settings": self.settings,
            "results": [asdict(row) for row in self.rows],
            "bounds": self.bounds,
            "left_out": self.left_out,
        }


def every_backend(shared: dict[str, Any] | None = None) -> tuple[tuple[Candidate, ...], dict[str, str]]:
    """Return a cache for every backend that can be used here, in every whole width that it has.

    Args:
        shared: options of `CacheConfig` for all of them.

    Returns:
        The caches, and the backends that are left out with their reasons.

    Raises:
        OptionValueError: one of the options can never work.
        UnsupportedError: there is no backend that can be used.
    """
    parse_candidates(FULL, shared)
    found: list[Candidate] = []
    left_out: dict[str, str] = {}
    for backend in list_backends():
        name = backend.qualified_name
        if not backend.availability.ok:
            left_out[name] = backend.availability.reason
            continue
        try:
            found += reversed(planned_candidates(backend.name, shared=shared)[1:])
        except KVQuantError as cause:
            left_out[name] = one_line(cause)
    if not found:
        raise UnsupportedError("the installed backends", [f"{name}: {reason}" for name, reason in left_out.items()])
    return tuple(found), left_out


def _backends(candidates: Iterable[Candidate]) -> Iterator[str]:
    """Yield the names of kvquant's backends that caches quantise with."""
    for candidate in candidates:
        if candidate.kind == "kvquant":
            config = CacheConfig.from_dict(candidate.options)
            yield config.backend
            yield from (options["backend"] for options in config.layers.values() if "backend" in options)


# ------------------------------------------------------------------------------------------------ the bound


def bound_rate(distortion: float, variances: Tensor) -> float:
    """Return the bits per element with which Shannon's bound allows a distortion.

    Args:
        distortion: above 0, as a share of the mean of `variances`.
        variances: of the channels, ``[channels]``; their unit does not matter.
    """
    ordered = (variances.double() / variances.double().mean()).sort().values
    count, below = len(ordered), ordered.cumsum(0) - ordered
    # The distortion when the level stands at each variance in turn; between two of them it is linear in the level.
    at = (below + torch.arange(count, 0, -1) * ordered) / count
    drowned = int(torch.searchsorted(at, torch.tensor(distortion, dtype=at.dtype)))
    if drowned == count:
        return 0.0
    level = (count * distortion - below[drowned]) / (count - drowned)
    return float((ordered / level).log2().clamp(min=0).mean() / 2)


def bound_curve(variances: Tensor) -> list[tuple[float, float]]:
    """Return points (rate, distortion) of Shannon's bound, from no bits to about nine."""
    shares = variances.double() / variances.double().mean()
    lowest = float(shares[shares > 0].log2().mean()) - 2 * _MOST_BITS  # a channel without variance takes no bits
    levels = torch.linspace(math.log2(float(shares.max())), lowest, _POINTS, dtype=torch.float64).exp2()
    return [
        (float((shares / level).log2().clamp(min=0).mean() / 2), float(shares.clamp(max=float(level)).mean()))
        for level in levels
    ]


# ------------------------------------------------------------------------------------------------ measuring


def measure_rate_distortion(
    options: RateDistortionOptions,
    journal: Journal,
    progress: Progress = lambda _: None,
    left_out: dict[str, str] | None = None,
) -> RateDistortionReport:
    """Measure what is not in the journal yet; a cache that fails does not stop the others.

    Args:
        options: what to measure.
        journal: opened with `RateDistortionOptions.settings`.
        progress: told how far the work is.
        left_out: caches that are left out already, for the report.

    Raises:
        OutOfMemoryError: memory ran out; finished parts are in the journal.
    """
    shape = (options.heads, options.tokens, options.head_dim, options.seed)
    states = {kind: STATES[kind](*shape).to(options.device) for kind in options.states}
    variances = {kind: given.double().var(dim=2).flatten().cpu() for kind, given in states.items()}
    journal.run(_parts(states, options), lambda _: progress(1), advice="fewer --tokens or --heads")
    rows, problems = [], dict(left_out or {})
    for kind in options.states:
        for candidate in options.compared:
            result = journal[kind, candidate.label]
            if "problem" in result:
                problems[candidate.label] = result["problem"]
            else:
                rows += [_row(candidate.label, kind, stream, result[stream], variances) for stream in options.streams]
    bounds = {kind: bound_curve(spread) for kind, spread in variances.items()}
    return RateDistortionReport(journal.settings, tuple(rows), bounds, problems)


def _parts(states: dict[str, Tensor], options: RateDistortionOptions) -> Iterator[tuple[Key, Callable[[], Any]]]:
    for kind, given in states.items():
        for candidate in options.compared:
            yield (kind, candidate.label), functools.partial(_measured, candidate, given, options.seed)


def _measured(candidate: Candidate, given: Tensor, seed: int) -> dict[str, Any]:
    """Return rate and mean squared error of both streams, or the problem that a cache has."""
    torch.manual_seed(seed)  # what a method draws must not depend on what was done before
    try:
        cache = _empty(candidate, given)
        cache.update(given, given, 0)
        streams, states = quantized_streams(cache.layers[0]), held_states(cache.layers[0])
    except FAILURES as cause:
        if is_out_of_memory(cause):
            raise
        return {"problem": one_line(cause)}
    if not streams:
        return {"problem": f"it quantises none of {given.shape[2]} tokens: more --tokens, or a shorter window"}
    result = {}
    for name, stream, held in zip(STREAMS, streams, states, strict=True):
        part = slice(stream.start, stream.stop)  # the others are exact
        error = (held[:, :, part].double() - given[:, :, part].double()).square().mean()
        result[name] = {"bits": stream.bits_per_element, "error": float(error), "axis": stream.axis}
    return result


def _empty(candidate: Candidate, given: Tensor) -> Cache:
    """Return an empty cache with one layer at least."""
    if candidate.kind == "kvquant":
        return QuantizedCache.from_config(candidate.options)
    heads, _, head_dim = given.shape[1:]
    return candidate.make(
        PreTrainedConfig(num_hidden_layers=1, hidden_size=heads * head_dim, num_attention_heads=heads)
    )


def _row(
    label: str, kind: str, stream: str, measured: dict[str, Any], variances: dict[str, Tensor]
) -> RateDistortionRow:
    distortion = max(measured["error"] / float(variances[kind].mean()), 1e-30)  # an exact cache has none
    bound = bound_rate(distortion, variances[kind])
    return RateDistortionRow(
        cache=label,
        states=kind,
        stream=stream,
        axis=measured["axis"],
        bits_per_element=measured["bits"],
        distortion=distortion,
        snr=-10 * math.log10(distortion),
        bound=bound,
        gap=measured["bits"] - bound,
    )

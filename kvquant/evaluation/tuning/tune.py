"""A tuning from end to end: what each layer's bits are worth, the best assignment, and what it is worth on other text.

The sensitivity of a stream (the keys, or the values, of a layer) to a width is the KL divergence to full precision
with that stream at that width and every other at the most bits that the backend has, less the divergence with the most
bits everywhere. It is measured through the cache, one new token at a time, as `kvquant.evaluation.perplexity` does it.

The best assignment minimises the sum of sensitivities. That they add up is an assumption: errors of two layers can
make each other worse, or hide each other. So what counts is measured in the end: the assignment beside uniform ones
within the same budget, on text that was not used before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvquant.engine.config import CacheConfig
from kvquant.errors import OptionValueError
from kvquant.evaluation import intervals
from kvquant.evaluation.candidates import FULL, Candidate
from kvquant.evaluation.journal import Journal
from kvquant.evaluation.loading import LoadedModel, hash_tokens
from kvquant.evaluation.perplexity import NEEDS_LESS, PerplexityOptions, Progress, Windows, score_windows
from kvquant.evaluation.planning.model import model_shape
from kvquant.evaluation.sizes import at_most
from kvquant.evaluation.tuning.assignment import ROUNDING, Costs, Solution, solve, trade_off
from kvquant.evaluation.tuning.budget import Budget, Memory, memory_budget, said_budget
from kvquant.evaluation.tuning.report import CurvePoint, StreamRow, TuneReport, TuneRow, UniformPoint
from kvquant.evaluation.tuning.sensitivity import (
    StoredBits,
    column,
    sensitivities,
    sensitivity_candidates,
    stored_bits,
)
from kvquant.evaluation.tuning.space import Assignment, Space, Width, find_space
from kvquant.evaluation.tuning.text import split

_FULL = Candidate(FULL, FULL)
#: Caches that are verified at most: full precision, the tuned one, and two uniform ones.
_VERIFIED = 4


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What to tune.

    Attributes:
        base: options of the cache, without bits.
        widths: widths to choose from, None for all whole ones that the backend has with these options.
        budget: bits per element at most; or
        memory: bytes that weights and cache must fit into, with
        context: so many tokens, None for the model's positions,
        batch: in so many sequences, and
        overhead: so many bytes for other things.
        length: tokens of a window of the text.
        prefill: the first of them, fed in one pass; None takes half.
        windows: windows that sensitivities are measured on.
        verify: windows behind them that the result is verified on, at most.
        seed: of the bootstrap, and of what methods draw.

    Raises:
        OptionValueError: a value can never work, or does not go with another.
    """

    base: Mapping[str, Any]
    widths: tuple[Width, ...] | None = None
    budget: float | None = None
    memory: int | None = None
    context: int | None = None
    batch: int = 1
    overhead: int = 0
    length: int = 1024
    prefill: int | None = None
    windows: int = 3
    verify: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.memory is None):
            expected = "bits per element, such as 2.5, or else a --memory such as 8GB with a --context such as 64k"
            raise OptionValueError("budget", self.budget, expected)
        for option, without in (("context", None), ("batch", 1), ("overhead", 0)):
            value = getattr(self, option)
            if self.memory is None and value != without:
                raise OptionValueError(option, value, "a --memory beside it: it says what must fit into that")
        least = {"length": 4, "windows": 1, "verify": 2, "batch": 1, "overhead": 0, "context": 2}
        for option, fewest in least.items():
            given = getattr(self, option)
            if given is not None and given < fewest:
                raise OptionValueError(option, given, f"a whole number, at least {fewest}")
        if self.prefill is not None and not 1 <= self.prefill < self.length:
            raise OptionValueError("prefill", self.prefill, f"1 to {self.length - 1} tokens, below --length")

    @property
    def first_pass(self) -> int:
        """Tokens of a window's prefill."""
        return self.length // 2 if self.prefill is None else self.prefill


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the long work.

    Attributes:
        space: what there is to choose.
        budget: bits that there are.
        stored: how a window of the text is stored in each width; without tables where memory is the budget.
        tuning, verifying: windows of the text.
    """

    space: Space
    budget: Budget
    stored: StoredBits
    tuning: Windows
    verifying: Windows

    @property
    def work(self) -> int:
        """How much there is to do at most, for a progress bar: tokens."""
        sensitivity = (1 + len(sensitivity_candidates(self.space))) * len(self.tuning.tokens)
        return self.tuning.context * (sensitivity + _VERIFIED * len(self.verifying.tokens))


def prepare(loaded: LoadedModel, text: Sequence[int], options: TuneOptions) -> Prepared:
    """Find out what there is to choose and what it may take, and refuse now what cannot work later.

    Raises:
        ConfigError, BackendError: a width, a cache, the text or the budget cannot work; the message says what would.
        MissingExtraError: scipy is not installed.
    """
    intervals.require_scipy()
    loaded.check_context("length", options.length)
    space = find_space(options.base, options.widths, loaded.model.config)
    tuning, verifying = split(text, loaded.prefix, options.length, options.first_pass, options.windows, options.verify)
    window = tuning.tokens[:1, : tuning.context]
    stored = stored_bits(loaded, space, window, tuning.prefill, tables=options.memory is None)
    if options.budget is not None:
        budget = said_budget(options.budget, space, stored)
    else:
        budget = memory_budget(_memory(loaded, options), space, stored)
    return Prepared(space, budget, stored, tuning, verifying)


def _memory(loaded: LoadedModel, options: TuneOptions) -> Memory:
    model = model_shape(loaded.name, dtype=str(loaded.model.dtype).removeprefix("torch."), batch=options.batch)
    context = options.context or model.positions
    if context is None:
        raise OptionValueError("context", None, "a number of tokens, for the model's config does not say how many")
    return Memory(model, options.memory or 0, context, options.overhead, str(loaded.device))


def run_settings(loaded: LoadedModel, text: Sequence[int], options: TuneOptions, space: Space) -> dict[str, Any]:
    """Return all that a window's figures depend on, for a journal: neither the budget nor the widths to choose from."""
    return {
        "evaluation": "tune",
        "text": hash_tokens(text),
        "prefix": loaded.prefix,
        "length": options.length,
        "prefill": options.first_pass,
        "seed": options.seed,
        "cache": space.candidate(space.uniform(space.widest, space.widest)).settings(),
        "model": loaded.settings(),
    }


# ------------------------------------------------------------------------------------------------ the work


def tune(
    loaded: LoadedModel,
    prepared: Prepared,
    options: TuneOptions,
    journal: Journal,
    progress: Progress = lambda _: None,
) -> TuneReport:
    """Measure sensitivities, solve, and measure the result beside uniform caches on held-out text.

    Args:
        loaded: the model.
        prepared: what `prepare` returned.
        options: what to tune.
        journal: opened with `run_settings`; what is in it is not measured again.
        progress: told how far the work is.

    Raises:
        OutOfMemoryError: memory ran out; finished parts are in the journal.
    """
    space, budget = prepared.space, prepared.budget
    _score(loaded, sensitivity_candidates(space), prepared.tuning, options, journal, progress)
    floor, added = sensitivities(space, prepared.tuning, journal)
    costs = Costs(budget.shares, prepared.stored.bits, added)
    best = solve(costs, budget.bits)
    solutions = {f"tuned to {at_most(budget.bits)} bits": best, **_rivals(space, costs, budget.bits)}
    compared = {name: _Compared.of(space, solution) for name, solution in solutions.items()}
    distinct = {one.candidate.label: one.candidate for one in compared.values()}
    _score(loaded, tuple(distinct.values()), prepared.verifying, options, journal, progress)
    rows = _rows(compared, prepared.verifying, journal, floor, options)
    written = min(rows, key=lambda row: row.kl.value).cache
    return TuneReport(
        settings=_settings(journal, prepared, options, compared),
        floor=floor,
        streams=_stream_rows(space, costs, best),
        curve=[CurvePoint(one.bits, floor + one.added) for one in trade_off(costs)],
        uniform=_uniform_points(space, costs, floor),
        written=written,
        config=CacheConfig.from_dict(compared[written].candidate.options).to_dict(),
        rows=rows,
    )


@dataclass(frozen=True)
class _Compared:
    """An assignment that is measured on held-out text."""

    solution: Solution
    assignment: Assignment
    candidate: Candidate

    @classmethod
    def of(cls, space: Space, solution: Solution) -> _Compared:
        widths = (space.widths[number] for number in solution.choice)
        assignment = dict(zip(space.streams, widths, strict=True))
        return cls(solution, assignment, space.candidate(assignment))


def _score(
    loaded: LoadedModel,
    candidates: tuple[Candidate, ...],
    windows: Windows,
    options: TuneOptions,
    journal: Journal,
    progress: Progress,
) -> None:
    asked = PerplexityOptions(
        candidates=(_FULL, *candidates), contexts=(options.length,), prefill=options.first_pass, seed=options.seed
    )
    score_windows(loaded, (windows,), asked, journal, progress, advice=f"a shorter --length, {NEEDS_LESS}")


def _rivals(space: Space, costs: Costs, budget: float) -> dict[str, Solution]:
    """Return the largest uniform assignment within a budget, and that with more bits for the keys, where they fit."""
    fitting = [
        (value, key, solution)
        for value in space.widths
        for key in space.widths
        if (solution := _uniform(space, costs, key, value)).bits <= budget + ROUNDING and key >= value
    ]
    value = max((value for value, key, _ in fitting if key == value), default=None)
    if value is None:  # a width may take least in one stream, and more than another width elsewhere
        return {}
    keys = {key: solution for one, key, solution in fitting if one == value}
    more = max(keys)
    rivals = {f"uniform {value:g}": keys[value]}
    return rivals if more == value else {**rivals, f"uniform K{more:g} V{value:g}": keys[more]}


def _uniform(space: Space, costs: Costs, key: Width, value: Width) -> Solution:
    assignment: Assignment = space.uniform(key, value)
    return costs.solution(tuple(space.widths.index(assignment[stream]) for stream in space.streams))


# ------------------------------------------------------------------------------------------------ summing up


def _rows(
    compared: Mapping[str, _Compared], windows: Windows, journal: Journal, floor: float, options: TuneOptions
) -> tuple[TuneRow, ...]:
    estimate = functools.partial(intervals.estimate, seed=options.seed)
    divergences = {name: column(one.candidate, "kl", windows, journal) for name, one in compared.items()}
    first = next(iter(compared))
    rows = []
    for name, one in compared.items():
        kl = divergences[name]
        bits = column(one.candidate, "bits", windows, journal)
        rows.append(
            TuneRow(
                cache=name,
                bits_per_element=sum(bits) / len(bits),
                predicted=floor + one.solution.added,
                kl=estimate(intervals.mean, kl),
                ratio=None if name == first else estimate(intervals.ratio_of_means, divergences[first], kl),
                agreement=estimate(intervals.mean, column(one.candidate, "agreement", windows, journal)),
                windows=kl,
            )
        )
    return tuple(rows)


def _stream_rows(space: Space, costs: Costs, best: Solution) -> list[StreamRow]:
    return [
        StreamRow(
            layer=stream.layer,
            stream=stream.name,
            nbits=space.widths[best.choice[at]],
            share=float(costs.shares[at]),
            bits=costs.bits[at].tolist(),
            added=costs.added[at].tolist(),
        )
        for at, stream in enumerate(space.streams)
    ]


def _uniform_points(space: Space, costs: Costs, floor: float) -> list[UniformPoint]:
    found = ((width, _uniform(space, costs, width, width)) for width in space.widths)
    return [UniformPoint(width, one.bits, floor + one.added) for width, one in found]


def _settings(
    journal: Journal, prepared: Prepared, options: TuneOptions, compared: Mapping[str, _Compared]
) -> dict[str, Any]:
    space, budget = prepared.space, prepared.budget
    described = budget.describe()
    if budget.memory is not None:
        described["takes"] = {name: budget.memory.takes(space, one.assignment) for name, one in compared.items()}
    return {
        **{name: value for name, value in journal.settings.items() if name != "cache"},
        "base": dict(options.base),
        "widths": list(space.widths),
        "widest": space.widest,
        "windows": len(prepared.tuning.tokens),
        "verify": len(prepared.verifying.tokens),
        "budget": described,
        "caches": {name: one.candidate.settings() for name, one in compared.items()},
    }

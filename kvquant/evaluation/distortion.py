"""What each backend makes of the same states: bits, error and speed, side by side.

States go through a cache as a prefill does it, so that bits count what is really held (codes, scales, offsets, tables,
in the types that the core chose) and times are of the whole way: rows, backend, checks, packing. Methods take turns,
round by round in one process, each beside the yardstick of the same bits and axis, and ratios are taken within a round,
because machines are shared and noisy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from kvquant.attention.tiles import tile_tokens
from kvquant.cache.cache import QuantizedCache
from kvquant.engine.grouping import block_tokens
from kvquant.errors import OptionValueError
from kvquant.evaluation.failures import FAILURES, one_line
from kvquant.evaluation.loading import plugin_versions
from kvquant.evaluation.measure import Spread, describe_machine, seconds, steady
from kvquant.evaluation.methods import YARDSTICK, Method
from kvquant.evaluation.synthetic import STATES
from kvquant.plugin.spec import Axis

T = TypeVar("T")

#: Called as work goes on, with the steps done since the last call; `DistortionOptions.work` in all.
Progress = Callable[[float], None]

#: Seconds that one turn of a method fills with calls, each way; a call that takes longer is made once.
_TURN = 0.03
#: What a backend may raise while it is measured without ending the measurement of the others.
_FAILURES = (*FAILURES, MemoryError)


@dataclass(frozen=True, kw_only=True)
class DistortionOptions:
    """What to measure.

    Attributes:
        methods: what to compare, see `find_methods`.
        group_size: numbers that share a scale.
        tokens, heads, head_dim: of the states, ``[1, heads, tokens, head_dim]``, once as keys and once as values.
        rounds: rounds, in each of which every method has its turn.
        device: torch device.
        threads: torch's threads, None for its own choice.
        seed: of the states.

    Raises:
        OptionValueError: a value can never work.
    """

    methods: tuple[Method, ...]
    group_size: int = 64
    tokens: int = 2048
    heads: int = 4
    head_dim: int = 64
    rounds: int = 5
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("group_size", "tokens", "heads", "head_dim", "rounds"):
            if getattr(self, name) < 1:
                raise OptionValueError(name, getattr(self, name), "at least 1")
        if self.threads is not None and self.threads < 1:
            raise OptionValueError("threads", self.threads, "at least 1, or None for torch's choice")
        axes = {cast("Axis", method.axis) for method in self.methods}
        # All tokens must be quantised: those that wait in the window for a whole block have no error.
        block = math.lcm(*(block_tokens([(axis, self.group_size)]) for axis in axes))
        if self.tokens % block:
            raise OptionValueError("tokens", self.tokens, f"a multiple of {block}, which are quantised at once")
        if "token" in axes and self.head_dim % self.group_size:
            raise OptionValueError("head_dim", self.head_dim, f"a multiple of the group size, {self.group_size}")

    @property
    def work(self) -> int:
        """How much there is to do, for a progress bar."""
        return len(self.methods) * (self.rounds + 1)


@dataclass(frozen=True)
class Quality:
    """What became of some states.

    Attributes:
        bits_per_element: bits of codes, scales, offsets and tables over the numbers that they stand for.
        error: the norm (root of the summed squares) of what was read less what was given, over that of what was given.
    """

    bits_per_element: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Distortion:
    """What one method made of the states.

    Attributes:
        backend, nbits, axis, options: the method.
        gaussian, outliers: bits and error on states of that kind, see `synthetic`.
        quantise, dequantise: numbers a second; one figure a round.
        quantise_ratio, dequantise_ratio: the same over the yardstick's in the same round; None without one.
    """

    backend: str
    nbits: float
    axis: str
    options: Mapping[str, Any]
    gaussian: Quality
    outliers: Quality
    quantise: Spread
    dequantise: Spread
    quantise_ratio: Spread | None
    dequantise_ratio: Spread | None


@dataclass(frozen=True, kw_only=True)
class DistortionReport:
    """What was measured, where, and what could not be.

    Attributes:
        machine: see `describe_machine`.
        libraries: versions of what the backends come from and need, by distribution.
        options: what was asked for.
        results: one for each method that could be measured, in order.
        left_out: backends and methods that could not be, and why.
    """

    machine: Mapping[str, Any]
    libraries: Mapping[str, str]
    options: DistortionOptions
    results: tuple[Distortion, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report in plain builtins."""
        return asdict(self)


@dataclass
class _Measured:
    """What is known of one method so far: its quality by kind of states, and seconds each way in each round."""

    quality: dict[str, Quality] = field(default_factory=dict)
    quantise: list[float] = field(default_factory=list)
    dequantise: list[float] = field(default_factory=list)
    problem: str = ""


_States = Mapping[str, Tensor]
_Take = Callable[[Method, DistortionOptions, _States, _Measured], None]


def measure_distortion(options: DistortionOptions, left_out: Mapping[str, str], progress: Progress) -> DistortionReport:
    """Measure every method; one that fails does not stop the others.

    Args:
        options: what to measure.
        left_out: what `find_methods` left out, for the report.
        progress: told how far the work is.

    Raises:
        BackendFactoryError: a backend refuses an option of its own, before anything is measured.
    """
    with steady(options.threads):
        return _measure(options, left_out, progress)


def _measure(options: DistortionOptions, left_out: Mapping[str, str], tell: Progress) -> DistortionReport:
    methods = options.methods
    for method in methods:
        method.cache(options.group_size)
    shape = (options.heads, options.tokens, options.head_dim, options.seed)
    states = {kind: make(*shape).to(options.device) for kind, make in STATES.items()}
    machine = describe_machine(options.device)

    measured = [_Measured() for _ in methods]
    for method, made in zip(methods, measured, strict=True):
        _attempt(_take_quality, method, options, states, made)
        tell(1)
    for number in range(options.rounds):
        for index in _turns(methods, number):
            _attempt(_take_times, methods[index], options, states, measured[index])
            tell(1)
    yardsticks = {
        (method.nbits, method.axis): made
        for method, made in zip(methods, measured, strict=True)
        if method.backend == YARDSTICK and not method.options and not made.problem
    }
    return DistortionReport(
        machine=machine,
        libraries=_libraries(methods),
        options=options,
        results=tuple(
            _result(method, made, yardsticks.get((method.nbits, method.axis)), 2 * states["gaussian"].numel())
            for method, made in zip(methods, measured, strict=True)
            if not made.problem
        ),
        left_out={**left_out, **_problems(methods, measured)},
    )


def _attempt(take: _Take, method: Method, options: DistortionOptions, states: _States, made: _Measured) -> None:
    """Take some measurement of a method, unless it has failed before."""
    if not made.problem:
        try:
            take(method, options, states, made)
        except _FAILURES as failure:
            made.problem = one_line(failure)


def _turns(methods: Sequence[Method], number: int) -> list[int]:
    """Return the order of turns: what has the same bits and axis close in time, and every other round backwards."""
    order = sorted(range(len(methods)), key=lambda index: (methods[index].nbits, methods[index].axis))
    return order[::-1] if number % 2 else order


def _take_quality(method: Method, options: DistortionOptions, states: _States, made: _Measured) -> None:
    for kind, given in states.items():
        cache = method.cache(options.group_size)
        cache.update(given, given, 0)
        exact = given.double()
        error = (cache.layers[0].keys.double() - exact).norm() / exact.norm()
        # Every token is quantised, see `DistortionOptions`, so there are bits to speak of.
        made.quality[kind] = Quality(cast("float", cache.bits_per_element), float(error))


# ------------------------------------------------------------------------------------------------ speed


def _take_times(method: Method, options: DistortionOptions, states: _States, made: _Measured) -> None:
    """Take the seconds to quantise keys and values, and to read them tile by tile as attention does."""
    given = states["gaussian"]

    def empty() -> QuantizedCache:
        return method.cache(options.group_size)

    def quantise(cache: QuantizedCache) -> None:
        cache.update(given, given, 0)

    def read(cache: QuantizedCache) -> None:
        keys, values = cache.layers[0].stores
        for start, stop in keys.spans(tile_tokens(keys, values, options.heads)):
            keys.tile(start, stop)
            values.tile(start, stop)

    filled = empty()
    quantise(filled)
    made.quantise.append(_typical(empty, quantise, given.device))
    made.dequantise.append(_typical(lambda: filled, read, given.device))


def _typical(prepare: Callable[[], T], work: Callable[[T], object], device: torch.device) -> float:
    """Return the median seconds of as many calls as fill a turn. A quick first call, in cold memory, does not count."""
    samples: list[float] = []
    first = seconds(partial(work, prepare()), device)
    if first > _TURN:
        samples.append(first)
    while sum(samples) < _TURN:
        samples.append(seconds(partial(work, prepare()), device))
    return statistics.median(samples)


# ------------------------------------------------------------------------------------------------ the report


def _result(method: Method, made: _Measured, base: _Measured | None, numbers: int) -> Distortion:
    def ratio(way: str) -> Spread | None:
        if base is None:
            return None
        return Spread.of([theirs / own for theirs, own in zip(getattr(base, way), getattr(made, way), strict=True)])

    return Distortion(
        backend=method.backend,
        nbits=method.nbits,
        axis=method.axis,
        options=dict(method.options),
        gaussian=made.quality["gaussian"],
        outliers=made.quality["outliers"],
        quantise=Spread.of([numbers / taken for taken in made.quantise]),
        dequantise=Spread.of([numbers / taken for taken in made.dequantise]),
        quantise_ratio=ratio("quantise"),
        dequantise_ratio=ratio("dequantise"),
    )


def _problems(methods: Sequence[Method], measured: Sequence[_Measured]) -> dict[str, str]:
    """Return why methods failed; once for all methods of a backend that failed alike."""
    problems: dict[str, str] = {}
    for label in dict.fromkeys(method.label for method in methods):
        of = {
            method.text: made.problem for method, made in zip(methods, measured, strict=True) if method.label == label
        }
        alike = len(of) > 1 and len(set(of.values())) == 1
        problems.update({label: next(iter(of.values()))} if alike else of)
    return {name: problem for name, problem in problems.items() if problem}


def _libraries(methods: Iterable[Method]) -> dict[str, str]:
    versions = plugin_versions(method.backend for method in methods)
    versions.pop("kvquant", None)  # the machine's description has it
    return versions

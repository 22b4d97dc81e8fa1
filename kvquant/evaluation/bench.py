"""What a cache costs beside others: decode time, memory, and its share of a prefill.

The history is synthetic: each layer is given random key and value states of the context's length in one `update`,
which is what a prefill does to a cache, without the model's part of it. Then tokens are decoded through the model for
real, or, without a model, through cache and attention alone. The caches take turns, round by round in one process, so
that a busy machine hits all alike, and ratios are taken within a round. Peak memory is measured in a fresh process for
each cache, because memory that one cache frees would be used again by the next without any rise.

A quantised cache does most steps cheaply, and now and then one in which tokens leave its window and are quantised: a
*flush*. Rounds are too short to hit one by chance, so each ends with the step that flushes, and `amortised` weighs it
by how often it comes.

Attention over a cache must read what the cache holds, so its time cannot fall below those bytes over the bandwidth at
which the machine reads memory, which is measured too.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kvquant.errors import OptionValueError, listing
from kvquant.evaluation.contenders import Contender, parse_contenders, versions
from kvquant.evaluation.failures import FAILURES, one_line
from kvquant.evaluation.measure import PeakMemory, Spread, describe_machine, read_bandwidth, steady
from kvquant.evaluation.subject import (
    DTYPES,
    AttentionSubject,
    ModelSubject,
    Prefill,
    Round,
    Subject,
    SyntheticModel,
)

DEFAULT_CACHES = "dynamic,static,transformers:quanto:4,transformers:fp8,kvquant:reference:4,kvquant:reference:2"
DEFAULT_CONTEXTS = "4k,32k"
#: What speed is compared with, where nobody says what.
_FULL = Contender("dynamic")

#: Decode steps of a memory measurement: memory does not depend on their number.
_MEMORY_STEPS = 2
#: Tokens of a run that is not measured: enough to quantise some, so that libraries and kernels are loaded.
_WARM_UP_TOKENS = 512
#: What a cache may raise while it is measured without ending the measurement of the others.
_FAILURES = (*FAILURES, MemoryError)

#: Called as work goes on, with the part of `BenchOptions.work` that was done since the last call.
Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure.

    Attributes:
        contenders: the caches.
        contexts: tokens in the cache before decoding starts.
        against: label of the cache that speed is compared with; None takes ``dynamic`` if that is among them.
        model: name or folder of a model, None for `synthetic`.
        synthetic: shape of the model where none is named.
        attention: measure cache and attention alone, in the shape of `synthetic`, and not a model.
        batch: sequences at once.
        steps: decode steps timed in a round.
        rounds: rounds, in each of which every cache has its turn.
        dtype: name of the floating type of weights and states.
        device: torch device.
        threads: torch's threads, None for its own choice.
        seed: of weights and states.
        memory: whether to measure peak memory, in processes of their own.
        prefill: whether to run a real prefill of every length through the model, with each cache, in every round.

    Raises:
        OptionValueError: a value can never work.
    """

    contenders: tuple[Contender, ...] = parse_contenders(DEFAULT_CACHES)
    contexts: tuple[int, ...] = (4096, 32768)
    against: str | None = None
    model: str | None = None
    synthetic: SyntheticModel = field(default_factory=SyntheticModel)
    attention: bool = False
    batch: int = 1
    steps: int = 8
    rounds: int = 3
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    memory: bool = True
    prefill: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise OptionValueError(name, getattr(self, name), "at least 1")
        if self.threads is not None and self.threads < 1:
            raise OptionValueError("threads", self.threads, "at least 1, or None for torch's choice")
        if not self.contexts or min(self.contexts) < 1:
            raise OptionValueError("contexts", self.contexts, "numbers of tokens, at least 1")
        labels = [contender.label for contender in self.contenders]
        if self.against is not None and self.against not in labels:
            raise OptionValueError("against", self.against, f"one of the caches compared: {listing(labels)}")
        if self.dtype not in DTYPES:
            raise OptionValueError("dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        if self.attention and self.model is not None:
            raise OptionValueError("model", self.model, "no model together with attention alone")
        if self.attention and self.prefill:
            raise OptionValueError("prefill", self.prefill, "False together with attention alone: there is no model")

    @property
    def base(self) -> str:
        """Label of the cache that speed is compared with, which need not be among them."""
        return self.against or _FULL.label

    @property
    def work(self) -> int:
        """How much there is to do, for a progress bar: tokens, as a turn takes about as long as its context is long."""
        return sum(self.contexts) * len(self.contenders) * (self.rounds * (1 + self.prefill) + self.memory)


@dataclass(frozen=True, kw_only=True)
class CacheResult:
    """What one cache cost at one context length. Times are in seconds, memory in bytes; None where not measured.

    Attributes:
        cache: its label.
        context: tokens of history.
        problem: why it could not be measured, empty if it was.
        tokens: tokens in the cache at the end, history and decoded.
        step: a decode step without a flush; all steps of all rounds.
        flush: a decode step with a flush; one a round.
        flush_period: tokens from one flush to the next.
        amortised: a decode step with its share of a flush; one figure a round.
        speedup: `amortised` of the cache that speed is compared with over that of this cache, in the same round.
        speedup_quantised: the same for the fastest, in the median, of the quantised caches that are not kvquant's.
        attention: attention alone of a decode step, where it is measured apart.
        kernel: what attends over quantised tokens, in words.
        read_bytes: what attention must read at least: `cache_bytes` without spare room.
        over_limit: `attention` over the time that reading `read_bytes` takes at the machine's bandwidth.
        fill: appending the whole history to all layers; one a round.
        prefill: a model's prefill of the whole length; one a round.
        prefill_added: the cache's share of that beyond the share of ``dynamic`` in the same round, over the time that
            the model itself takes.
        cache_bytes: of the tensors held with the history in.
        peak_bytes: rise of memory in use while filling and decoding, flush included.
        step_bytes: rise of memory in use while decoding, flush included, above what the filled cache takes.
        peak_method: how the two were measured.
    """

    cache: str
    context: int
    problem: str = ""
    tokens: int = 0
    step: Spread | None = None
    flush: Spread | None = None
    flush_period: int | None = None
    amortised: Spread | None = None
    speedup: Spread | None = None
    speedup_quantised: Spread | None = None
    attention: Spread | None = None
    kernel: str = ""
    read_bytes: int | None = None
    over_limit: float | None = None
    fill: Spread | None = None
    prefill: Spread | None = None
    prefill_added: Spread | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    step_bytes: int | None = None
    peak_method: str = ""


@dataclass(frozen=True)
class BenchReport:
    """What was measured, on what; `to_dict()` gives plain builtins.

    Attributes:
        machine, model: what figures depend on.
        bandwidth: bytes a second at which the machine reads memory.
        floor: seconds of the model's decode step over a cache with next to nothing in it, below which no cache can
            bring it; None without a model.
        options: what was asked for.
        results: one for each context and cache, in this order.
    """

    machine: dict[str, Any]
    model: dict[str, Any]
    bandwidth: float
    floor: Spread | None
    options: BenchOptions
    results: tuple[CacheResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins, fit for JSON."""
        return {"kind": "bench", **asdict(self)}


def _subject(options: BenchOptions) -> Subject:
    tokens = max(options.contexts) + options.steps
    if options.attention:
        return AttentionSubject(options.synthetic, tokens, options.dtype, options.device, options.seed, options.batch)
    model = options.synthetic if options.model is None else options.model
    return ModelSubject(model, tokens, options.dtype, options.device, options.seed, options.batch)


def _room(options: BenchOptions, context: int) -> int:
    """Return the tokens that a cache of fixed size must have room for; it never flushes."""
    return context + 1 + max(options.steps, _MEMORY_STEPS)


# ------------------------------------------------------------------------------------------------ all of them


def bench(options: BenchOptions, progress: Progress | None = None) -> BenchReport:
    """Measure.

    Peak memory is measured in new processes, which import the caller's main module: a script that calls this needs
    ``if __name__ == "__main__":``, as always with `multiprocessing`.

    Args:
        options: what to measure.
        progress: told how far the work is.

    Raises:
        ConfigError: an option cannot be honoured, whatever is installed.
        ModelLoadError: the model cannot be loaded.
    """
    with steady(options.threads):
        return _bench(options, progress or (lambda _: None))


def _bench(options: BenchOptions, tell: Progress) -> BenchReport:
    subject = _subject(options)
    problems = {contender: contender.why_not(subject.config) for contender in options.contenders}
    machine, model = describe_machine(options.device), subject.describe()
    machine.update(versions(options.contenders))
    bandwidth, floor = read_bandwidth(subject.device), _floor(subject, options)

    taken: _Taken = {}
    for context in options.contexts:
        history = subject.history(context)
        for number in range(options.rounds):
            for contender in _rotated(options.contenders, number):
                if not problems[contender]:
                    try:
                        turn = _turn(subject, contender, history, options)
                        taken.setdefault((contender, context), []).append(turn)
                    except _FAILURES as failure:
                        problems[contender] = _failed(contender, context, failure)
                tell(context * (1 + options.prefill))
        del history
    # A second look: other work on the machine slows reading down, and nothing makes it faster than it is.
    bandwidth = max(bandwidth, read_bandwidth(subject.device))
    # The processes that measure memory load the model again: two at a time might not fit.
    del subject

    results = []
    for context in options.contexts:
        for contender in options.contenders:
            peak, problem = _Peak(), problems[contender]
            if len(taken.get((contender, context), [])) == options.rounds:
                peak = _peak_in_new_process(options, contender, context) if options.memory else peak
                problem = peak.problem
            results.append(_result(contender, context, problem, options.base, taken, bandwidth, peak))
            tell(context * options.memory)
    return BenchReport(machine, model, bandwidth, floor, options, tuple(results))


def _failed(contender: Contender, context: int, failure: BaseException) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in versions([contender]).items())
    return f"failed at {context} tokens{f' ({libraries})' if libraries else ''}: {one_line(failure)}"


@dataclass(frozen=True)
class _Turn:
    """What one cache did in one round."""

    round: Round
    prefill: Prefill | None


_Taken = dict[tuple[Contender, int], list[_Turn]]


def _turn(
    subject: Subject, contender: Contender, history: list[tuple[torch.Tensor, torch.Tensor]], options: BenchOptions
) -> _Turn:
    context = history[0][0].shape[2]
    room = _room(options, context)
    prefill = None
    if options.prefill and isinstance(subject, ModelSubject):
        prefill = subject.prefill(contender.make(subject.config, room), context)
    return _Turn(subject.run(contender.make(subject.config, room), history, options.steps), prefill)


def _floor(subject: Subject, options: BenchOptions) -> Spread | None:
    """Return the seconds of a model's decode step over a cache that holds a single token."""
    if not isinstance(subject, ModelSubject):
        return None
    cache = _FULL.make(subject.config, 0)
    return Spread.of(subject.run(cache, subject.history(1), options.steps * options.rounds).steps)


def _result(
    contender: Contender, context: int, problem: str, base: str, taken: _Taken, bandwidth: float, peak: _Peak
) -> CacheResult:
    turns = taken.get((contender, context), [])
    if not turns:
        return CacheResult(cache=contender.label, context=context, problem=problem)
    rounds = [turn.round for turn in turns]
    compared = next((made for (other, length), made in taken.items() if (other.label, length) == (base, context)), [])
    full = taken.get((_FULL, context), [])
    rivals = [made for (other, length), made in taken.items() if other.is_rival and length == context]
    fastest = min(rivals, key=_typical_step, default=[])
    flushes = [made.flush for made in rounds if made.flush is not None]
    attention = Spread.of([step for made in rounds for step in made.attention]) if rounds[0].attention else None
    prefills = [turn.prefill.whole for turn in turns if turn.prefill is not None]
    return CacheResult(
        cache=contender.label,
        context=context,
        problem=problem,
        tokens=rounds[-1].tokens,
        step=Spread.of([step for made in rounds for step in made.steps]),
        flush=Spread.of(flushes) if flushes else None,
        flush_period=rounds[-1].flush_period,
        amortised=Spread.of([made.amortised for made in rounds]),
        speedup=_speedup(compared, turns),
        speedup_quantised=_speedup(fastest, turns),
        attention=attention,
        kernel=rounds[-1].kernel,
        read_bytes=rounds[-1].read,
        over_limit=None if attention is None else attention.median * bandwidth / rounds[-1].read,
        fill=Spread.of([made.fill for made in rounds]),
        prefill=Spread.of(prefills) if prefills else None,
        prefill_added=_prefill_added(full, turns),
        cache_bytes=rounds[-1].held,
        peak_bytes=peak.rise,
        step_bytes=peak.step,
        peak_method=peak.method,
    )


def _typical_step(turns: list[_Turn]) -> float:
    return statistics.median(turn.round.amortised for turn in turns)


def _speedup(base: list[_Turn], turns: list[_Turn]) -> Spread | None:
    if not base or len(base) != len(turns):
        return None
    return Spread.of([other.round.amortised / made.round.amortised for made, other in zip(turns, base, strict=True)])


def _prefill_added(base: list[_Turn], turns: list[_Turn]) -> Spread | None:
    if len(base) != len(turns):
        return None
    pairs = [(made.prefill, other.prefill) for made, other in zip(turns, base, strict=True)]
    shares = [(mine.cache - other.cache) / (mine.whole - mine.cache) for mine, other in pairs if mine and other]
    return Spread.of(shares) if shares else None


def _rotated(contenders: tuple[Contender, ...], number: int) -> tuple[Contender, ...]:
    """Return the caches in another order each round, so that none is always first."""
    start = number % len(contenders)
    return contenders[start:] + contenders[:start]


# ------------------------------------------------------------------------------------------------ peak memory


@dataclass(frozen=True)
class _Peak:
    """Bytes by which memory in use rises in all, and in a decode step; or why that could not be measured."""

    rise: int | None = None
    step: int | None = None
    method: str = ""
    problem: str = ""


def _peak_in_new_process(options: BenchOptions, contender: Contender, context: int) -> _Peak:
    # Not forked: the threads of torch do not survive that, and the child would start with this process's memory.
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawning, initializer=_keep_stdout_clean) as pool:
        try:
            return pool.submit(_peak, options, contender, context).result()
        except BrokenProcessPool:
            return _Peak(problem="the process that measured its memory ended early, perhaps killed for lack of memory")


def _keep_stdout_clean() -> None:
    """Send what libraries print in the new process to stderr: the parent's stdout may be read by a program."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(sys.stderr.fileno(), 1)


def _peak(options: BenchOptions, contender: Contender, context: int) -> _Peak:
    """Measure in this process. What goes wrong comes back as text: not every exception can be pickled."""
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        subject = _subject(options)
        # A first run loads libraries, compiles kernels and starts threads, which is not the cache's doing.
        warm_up = min(_WARM_UP_TOKENS, max(options.contexts))
        subject.run(contender.make(subject.config, _room(options, warm_up)), subject.history(warm_up), 1)
        history, cache = subject.history(context), contender.make(subject.config, _room(options, context))
        gc.collect()
        with PeakMemory(subject.device) as filling:
            subject.fill(cache, history)
        with PeakMemory(subject.device) as decoding:
            subject.decode_steps(cache, history, _MEMORY_STEPS)
    except _FAILURES as failure:
        return _Peak(problem=f"measuring its memory failed: {one_line(failure)}")
    rise = max(filling.rise, decoding.before + decoding.rise - filling.before)
    return _Peak(rise, decoding.rise, filling.method)

"""What a cache costs beside others: decode time, memory, and the cache's own share of a prefill.

The history is synthetic: each layer is given random key and value states of the context's length in one `update`,
which is what a prefill does to a cache, without the model's part of it. Then tokens are decoded through the model for
real. The caches take turns, round by round in one process, so that a busy machine hits all alike, and ratios are taken
within a round. Peak memory is measured in a fresh process for each cache, because memory that one cache frees would be
used again by the next without any rise.

A quantised cache does most steps cheaply, and now and then one in which tokens leave its window and are quantised: a
*flush*. Rounds are too short to hit one by chance, so each ends with the step that flushes, and `amortised` weighs it
by how often it comes.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kvquant.errors import KVQuantError, OptionValueError
from kvquant.evaluation.contenders import Contender, one_line, parse_contenders
from kvquant.evaluation.measure import PeakMemory, Spread, describe_machine, steady
from kvquant.evaluation.subject import DTYPES, Round, Subject, SyntheticModel

DEFAULT_CACHES = "dynamic,transformers:quanto:4,kvquant:reference:4,kvquant:reference:2"
DEFAULT_CONTEXTS = "4k,32k"

#: Decode steps of a memory measurement: memory does not depend on their number.
_MEMORY_STEPS = 2
_WARM_UP_TOKENS = 64
#: What a cache may raise while it is measured without ending the measurement of the others.
_FAILURES = (KVQuantError, RuntimeError, ValueError, TypeError, LookupError, ImportError, MemoryError)

#: Called as work goes on, with the part of `BenchOptions.work` that was done since the last call.
Progress = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure.

    Attributes:
        contenders: the caches.
        contexts: tokens in the cache before decoding starts.
        model: name or folder of a model, None for `synthetic`.
        synthetic: shape of the model where none is named.
        steps: decode steps timed in a round.
        rounds: rounds, in each of which every cache has its turn.
        dtype: name of the floating type of weights and states.
        device: torch device.
        threads: torch's threads, None for its own choice.
        seed: of weights and states.
        memory: whether to measure peak memory, in processes of their own.

    Raises:
        OptionValueError: a value can never work.
    """

    contenders: tuple[Contender, ...] = parse_contenders(DEFAULT_CACHES)
    contexts: tuple[int, ...] = (4096, 32768)
    model: str | None = None
    synthetic: SyntheticModel = field(default_factory=SyntheticModel)
    steps: int = 8
    rounds: int = 3
    dtype: str = "float32"
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    memory: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "rounds"):
            if getattr(self, name) < 1:
                raise OptionValueError(name, getattr(self, name), "at least 1")
        if self.threads is not None and self.threads < 1:
            raise OptionValueError("threads", self.threads, "at least 1, or None for torch's choice")
        if not self.contexts or min(self.contexts) < 1:
            raise OptionValueError("contexts", self.contexts, "numbers of tokens, at least 1")
        if self.dtype not in DTYPES:
            raise OptionValueError("dtype", self.dtype, f"one of {', '.join(DTYPES)}")

    @property
    def work(self) -> int:
        """How much there is to do, for a progress bar: tokens, as a turn takes about as long as its context is long."""
        return sum(self.contexts) * len(self.contenders) * (self.rounds + self.memory)


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
        ratio: `amortised` over that of ``dynamic`` in the same round.
        fill: appending the whole history to all layers; one a round.
        cache_bytes: of the tensors held with the history in.
        peak_bytes: rise of memory in use while filling and decoding, flush included.
        peak_method: how that was measured.
    """

    cache: str
    context: int
    problem: str = ""
    tokens: int = 0
    step: Spread | None = None
    flush: Spread | None = None
    flush_period: int | None = None
    amortised: Spread | None = None
    ratio: Spread | None = None
    fill: Spread | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    peak_method: str = ""


@dataclass(frozen=True)
class BenchReport:
    """What was measured, on what; `to_dict()` gives plain builtins."""

    machine: dict[str, Any]
    model: dict[str, Any]
    options: BenchOptions
    results: tuple[CacheResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins, fit for JSON."""
        return asdict(self)


def parse_contexts(text: str) -> tuple[int, ...]:
    """Read numbers of tokens separated by commas; ``k`` stands for 1024.

    Raises:
        OptionValueError: something else is there, or a number comes twice.
    """
    contexts = []
    for part in text.lower().split(","):
        digits = part.strip().removesuffix("k")
        if not digits.isdecimal() or not int(digits):
            raise OptionValueError("contexts", text, "numbers of tokens separated by commas, such as 4k,32768")
        contexts.append(int(digits) * (1024 if part.strip().endswith("k") else 1))
    if len(set(contexts)) < len(contexts):
        raise OptionValueError("contexts", text, "each length once")
    return tuple(contexts)


def _subject(options: BenchOptions) -> Subject:
    model = options.synthetic if options.model is None else options.model
    return Subject(model, max(options.contexts) + options.steps, options.dtype, options.device, options.seed)


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
    problems = {contender: contender.why_not(subject.model.config) for contender in options.contenders}
    machine, model = describe_machine(options.device), subject.describe()

    rounds: dict[tuple[Contender, int], list[Round]] = {}
    for context in options.contexts:
        history = subject.history(context)
        for number in range(options.rounds):
            for contender in _rotated(options.contenders, number):
                if not problems[contender]:
                    try:
                        made = subject.run(contender.make(subject.model.config), history, options.steps)
                        rounds.setdefault((contender, context), []).append(made)
                    except _FAILURES as failure:
                        problems[contender] = f"failed at {context} tokens: {one_line(failure)}"
                tell(context)
        del history
    # The processes that measure memory load the model again: two at a time might not fit.
    del subject

    results = []
    for context in options.contexts:
        for contender in options.contenders:
            mine, base = rounds.get((contender, context), []), rounds.get((Contender("dynamic"), context), [])
            peak = _Peak()
            if len(mine) == options.rounds and options.memory:
                peak = _peak_in_new_process(options, contender, context)
            problem = peak.problem if len(mine) == options.rounds else problems[contender]
            results.append(_result(contender, context, problem, mine, base, peak))
            tell(context * options.memory)
    return BenchReport(machine, model, options, tuple(results))


def _result(
    contender: Contender, context: int, problem: str, rounds: list[Round], base: list[Round], peak: _Peak
) -> CacheResult:
    if not rounds:
        return CacheResult(cache=contender.label, context=context, problem=problem)
    flushes = [made.flush for made in rounds if made.flush is not None]
    paired = len(base) == len(rounds)
    ratios = [made.amortised / other.amortised for made, other in zip(rounds, base, strict=True)] if paired else []
    return CacheResult(
        cache=contender.label,
        context=context,
        problem=problem,
        tokens=rounds[-1].tokens,
        step=Spread.of([step for made in rounds for step in made.steps]),
        flush=Spread.of(flushes) if flushes else None,
        flush_period=rounds[-1].flush_period,
        amortised=Spread.of([made.amortised for made in rounds]),
        ratio=Spread.of(ratios) if ratios else None,
        fill=Spread.of([made.fill for made in rounds]),
        cache_bytes=rounds[-1].held,
        peak_bytes=peak.rise,
        peak_method=peak.method,
    )


def _rotated(contenders: tuple[Contender, ...], number: int) -> tuple[Contender, ...]:
    """Return the caches in another order each round, so that none is always first."""
    start = number % len(contenders)
    return contenders[start:] + contenders[:start]


# ------------------------------------------------------------------------------------------------ peak memory


@dataclass(frozen=True)
class _Peak:
    rise: int | None = None
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
        # A first run with next to nothing loads libraries and starts threads, which is not the cache's doing.
        subject.run(contender.make(subject.model.config), subject.history(_WARM_UP_TOKENS), 1)
        history, cache = subject.history(context), contender.make(subject.model.config)
        gc.collect()
        with PeakMemory(subject.device) as memory:
            subject.run(cache, history, _MEMORY_STEPS)
    except _FAILURES as failure:
        return _Peak(problem=f"measuring its memory failed: {one_line(failure)}")
    return _Peak(memory.rise, memory.method)

"""LongBench through caches: each question is asked once for every cache, scored, and its answer kept.

Beside the benchmark's score, which hardly moves on a few questions, stands what a cache changes about the model's
expectations: full precision's own answer is fed through every cache, token by token, and what the model expects at each
of its tokens is compared. With ``p`` the distribution of the next token through the full-precision cache and ``q`` that
through another, over the tokens of the answer behind its first, which the prefill alone decides:

- KL divergence: ``mean sum_v p(v) (log p(v) - log q(v))``, in nats (Kullback and Leibler, 1951);
- agreement: share of tokens for which both have the same first choice.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvquant.errors import OptionValueError
from kvquant.evaluation import intervals
from kvquant.evaluation.candidates import FULL, Candidate, body_bits, cache_bits, elements
from kvquant.evaluation.journal import Journal, Key
from kvquant.evaluation.loading import LoadedModel, hash_tokens
from kvquant.evaluation.longbench.data import Row, TaskData
from kvquant.evaluation.longbench.metrics import LIBRARIES, require_libraries, score
from kvquant.evaluation.longbench.protocol import Asker, Prompt, uses_chat
from kvquant.evaluation.longbench.report import LongBenchReport, summarise
from kvquant.evaluation.longbench.tasks import metrics_of
from kvquant.evaluation.perplexity import Progress, score_sums
from kvquant.evaluation.teacher import forced_logits

#: Rows of logits that are compared at once, in float64.
_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class LongBenchOptions:
    """What to measure.

    Attributes:
        candidates: the caches, full precision first.
        max_length: tokens of a prompt at most, before the chat template, or None for as many as the model has room for
            beside the answer. Longer ones lose their middle.
        chat: put prompts through the tokenizer's chat template, save those of the few-shot and code tasks; None where
            it has one.
        one_by_one: feed full precision's answer one token at a time. Otherwise as many at once as makes no difference
            but rounding.
        seed: of the bootstrap, and of what methods draw.

    Raises:
        OptionValueError: a value can never work.
    """

    candidates: tuple[Candidate, ...]
    max_length: int | None = None
    chat: bool | None = None
    one_by_one: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise OptionValueError("max_length", self.max_length, "at least 2 tokens")
        if self.seed < 0:
            raise OptionValueError("seed", self.seed, "at least 0")

    def settings(self) -> dict[str, Any]:
        """Return what results of parts depend on, in plain builtins."""
        return {
            "max_length": self.max_length,
            "one_by_one": self.one_by_one,
            "seed": self.seed,
            "caches": {candidate.label: candidate.settings() for candidate in self.candidates},
        }


def plan(loaded: LoadedModel, tasks: Sequence[TaskData], options: LongBenchOptions) -> Asker:
    """Return how the model is asked, and refuse now what cannot work later.

    Raises:
        OptionValueError: an answer does not fit into the model's context, or there is no chat template.
        UnsupportedError: a cache cannot be used with this model.
        MissingExtraError: a library that scores or intervals need is not installed.
    """
    intervals.require_scipy()
    require_libraries(metrics_of([data.task for data in tasks]))
    for candidate in options.candidates:
        candidate.make(loaded.model.config)
    asker = Asker(loaded, options.max_length, uses_chat(loaded, options.chat))
    for data in tasks:
        asker.room(data)
    return asker


def work(tasks: Sequence[TaskData], options: LongBenchOptions) -> int:
    """Return how much there is to do, for a progress bar: questions, once for each cache."""
    return sum(len(data.rows) for data in tasks) * len(options.candidates)


def run_settings(asker: Asker, tasks: Sequence[TaskData], options: LongBenchOptions) -> dict[str, Any]:
    """Return all that results depend on, for a journal."""
    loaded = asker.loaded
    first = tasks[0]
    mine = {
        "evaluation": "longbench",
        "tasks": {data.task.name: data.settings() for data in tasks},
        "chat": asker.chat,
        "chat_template": str(loaded.tokenizer.chat_template) if asker.chat else None,
        "tokens": hash_tokens(loaded.tokenizer.encode(first.prompt_of(first.rows[0]), verbose=False)),
        "libraries": {
            LIBRARIES[metric]: importlib.metadata.version(LIBRARIES[metric])
            for metric in sorted(metrics_of([data.task for data in tasks]) & set(LIBRARIES))
        },
    }
    return {**mine, **options.settings(), "model": loaded.settings()}


def measure_longbench(
    asker: Asker,
    tasks: Sequence[TaskData],
    options: LongBenchOptions,
    journal: Journal,
    progress: Progress = lambda _: None,
) -> LongBenchReport:
    """Ask what is not in the journal yet, and sum everything up.

    Args:
        asker: that of `plan`.
        tasks: the questions.
        options: what to measure.
        journal: opened with `run_settings`. It keeps every answer, which can be read there.
        progress: told how many questions are done.

    Raises:
        OutOfMemoryError: memory ran out; finished parts are in the journal.
    """
    journal.run(
        _parts(asker, tasks, options),
        lambda _: progress(1),
        advice="a smaller --max-length (prompts are prefilled whole), a smaller --dtype or a smaller model",
    )
    labels = [candidate.label for candidate in options.candidates]
    found = {
        (label, data.task.name): [journal[_key(data, row, label)] for row in data.rows]
        for data in tasks
        for label in labels
    }
    name = "" if any(data.is_sample for data in tasks) else asker.loaded.name  # nobody published scores of the sample
    rows = summarise(name, [data.task for data in tasks], labels, found, options.seed)
    return LongBenchReport(journal.settings, rows)


def _parts(
    asker: Asker, tasks: Sequence[TaskData], options: LongBenchOptions
) -> Iterator[tuple[Key, Callable[[], Any]]]:
    for data in tasks:
        for row in data.rows:
            subject = _Asked(asker, data, row, options)
            for candidate in options.candidates:
                yield _key(data, row, candidate.label), functools.partial(subject.part, candidate)


def _key(data: TaskData, row: Row, label: str) -> Key:
    return data.task.name, row.number, label


@dataclass(frozen=True)
class _Full:
    """What full precision says to a question.

    Attributes:
        answer: its answer's tokens.
        logits: ``[answer - 1, vocabulary]``, what is expected at each of them behind the first.
        numbers, bits: numbers that its cache holds at the end, and bits for each.
    """

    answer: list[int]
    logits: Tensor
    numbers: int
    bits: float


class _Asked:
    """One question, asked through one cache after another. What full precision says to it is worked out once."""

    def __init__(self, asker: Asker, data: TaskData, row: Row, options: LongBenchOptions) -> None:
        self._asker, self._data, self._row, self._options = asker, data, row, options

    @functools.cached_property
    def _prompt(self) -> Prompt:
        return self._asker.prompt(self._data, self._row)

    @functools.cached_property
    def _full(self) -> _Full:
        candidate = self._options.candidates[0]
        answer = self._asker.generate(self._data, self._prompt, self._empty(candidate))
        cache = self._empty(candidate)
        logits = self._forced(cache, answer)
        numbers = elements(cache)
        return _Full(answer, logits, numbers, cache_bits(cache, numbers))

    def _empty(self, candidate: Candidate) -> Any:
        return candidate.make(self._asker.loaded.model.config)

    def _forced(self, cache: Any, answer: list[int]) -> Tensor:
        """Feed prompt and answer; return what is expected at each token of the answer behind its first."""
        ids = self._prompt.ids
        tokens = torch.cat([ids, torch.tensor([answer[:-1]], dtype=ids.dtype, device=ids.device)], dim=1)
        model, one_by_one = self._asker.loaded.model, self._options.one_by_one
        fed = forced_logits(model, cache, tokens, ids.shape[1], one_by_one=one_by_one)
        return torch.cat(list(fed))[1:]

    def part(self, candidate: Candidate) -> dict[str, Any]:
        """Return the part's result, in plain builtins."""
        full = self._full
        torch.manual_seed(self._options.seed)  # what a method draws must not depend on what was done before
        if candidate.kind == FULL:
            return self._result(full.answer, full.logits, full.bits, full.bits)
        answer = self._asker.generate(self._data, self._prompt, self._empty(candidate))
        torch.manual_seed(self._options.seed)
        cache = self._empty(candidate)
        logits = self._forced(cache, full.answer)
        return self._result(answer, logits, body_bits(cache), cache_bits(cache, full.numbers))

    def _result(self, answer: list[int], logits: Tensor, bits: float | None, whole: float) -> dict[str, Any]:
        said, row = self._asker.text_of(answer), self._row
        return {
            "id": row.name,
            "answer": said,
            "score": score(self._data.task, said, row.answers, row.classes),
            **self._divergence(logits),
            "prompt": self._prompt.ids.shape[1],
            "truncated": self._prompt.truncated,
            "length": row.length,
            "bits": bits,
            "cache_bits": whole,
        }

    def _divergence(self, logits: Tensor) -> dict[str, float | None]:
        full = self._full
        if not len(logits):
            return {"kl": None, "agreement": None}  # an answer of one token is the prefill's alone
        targets = torch.tensor(full.answer[1:], device=logits.device)
        pairs = zip(full.logits.split(_ROWS), logits.split(_ROWS), targets.split(_ROWS), strict=True)
        _, kl, agreed = (torch.stack([score_sums(*three) for three in pairs]).sum(0) / len(targets)).tolist()
        return {"kl": kl, "agreement": agreed}

"""The needle test: whether a key that a long text states once is found again through a cache.

The haystack, needle and all, is prefilled in one pass, in which attention sees full-precision states. Question and
answer then go through the cache, as the tokens of a conversation do that asks about a text. Were the question a part of
the prefill, what the model makes of it, and the first token of its answer, would not have been through the cache.

The true answer is fed, and at each of its tokens the model is asked what it would have said. Greedy generation says the
key if and only if each of these first choices is the key's next token: as long as they are, both have fed the same
tokens. So one pass decides whether a key is retrieved, and gives the finer figures besides, which still tell caches
apart where all retrieve. With ``p`` the distribution of the next token through the full-precision cache and ``q`` that
through the quantised one, over the answer's tokens:

- negative log-likelihood of the answer: ``sum -log q(token)``, in nats;
- KL divergence: ``mean sum_v p(v) (log p(v) - log q(v))``, in nats (Kullback and Leibler, 1951);
- agreement: share of tokens for which both have the same first choice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvquant.errors import OptionValueError, UnsupportedError
from kvquant.evaluation import intervals
from kvquant.evaluation.candidates import FULL, Candidate, body_bits, cache_bits, elements
from kvquant.evaluation.haystack import Question, Sentences, pose
from kvquant.evaluation.intervals import Estimate
from kvquant.evaluation.journal import Journal, Key
from kvquant.evaluation.loading import LoadedModel, hash_tokens
from kvquant.evaluation.perplexity import Progress, score_sums
from kvquant.evaluation.teacher import Prefill, forced_logits


@dataclass(frozen=True, kw_only=True)
class NeedleOptions:
    """What to measure.

    Attributes:
        candidates: the caches, full precision first.
        contexts: tokens in the cache at the end, those of question and answer too.
        depths: where the needle is, in whole per cent of the haystack before it.
        trials: questions for each context and depth.
        sentences: what is hidden, and how it is asked for.
        prefill_question: feed the question with the haystack in one pass, as ``generate`` does with a prompt.
        one_by_one: feed one token at a time. Otherwise as many at once as makes no difference but rounding.
        seed: of the questions, of the bootstrap, and of what methods draw.

    Raises:
        OptionValueError: a value can never work.
    """

    candidates: tuple[Candidate, ...]
    contexts: tuple[int, ...] = (512, 1024, 2048)
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    trials: int = 10
    sentences: Sentences = field(default_factory=Sentences)
    prefill_question: bool = False
    one_by_one: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) < 1:
            raise OptionValueError("contexts", self.contexts, "numbers of tokens, at least 1")
        if not self.depths or min(self.depths) < 0 or max(self.depths) > 100:
            raise OptionValueError("depths", self.depths, "per cents of the haystack, from 0 to 100")
        if self.trials < 1:
            raise OptionValueError("trials", self.trials, "at least 1")
        if self.seed < 0:
            raise OptionValueError("seed", self.seed, "at least 0")

    def settings(self) -> dict[str, Any]:
        """Return what results of parts depend on, in plain builtins."""
        return {
            "contexts": list(self.contexts),
            "depths": list(self.depths),
            "trials": self.trials,
            **asdict(self.sentences),
            "prefill_question": self.prefill_question,
            "one_by_one": self.one_by_one,
            "seed": self.seed,
            "caches": {candidate.label: candidate.settings() for candidate in self.candidates},
        }


@dataclass(frozen=True)
class NeedleCell:
    """One cache at one context length and depth.

    Attributes:
        depth: where the needle is, in per cent of the haystack before it.
        retrieved: share of the keys that greedy generation says in full, with Wilson's interval.
        digits: share of their digits that are its first choice behind the true ones.
        nll: negative log-likelihood of an answer in nats.
        kl: KL divergence to full precision in nats.
        agreement: share of the answers' tokens whose first choice is that of full precision.
    """

    depth: int
    retrieved: Estimate
    digits: float
    nll: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class NeedleRow:
    """One cache at one context length, over all depths.

    Attributes:
        cache: its label.
        context: tokens in the cache at the end.
        questions: how many were asked.
        retrieved, digits, nll, kl, agreement: as in `NeedleCell`, with their intervals.
        bits_per_element: of what is quantised (codes, scales, offsets, tables), as measured; those of the type for
            full precision; None where nothing was quantised.
        cache_bits_per_element: of everything that the cache holds at the end: window, sink and spare room too.
        depths: the same for each depth.
        trials: for each question its depth, key, figures, and the first choices at the answer's tokens as a text.
    """

    cache: str
    context: int
    questions: int
    retrieved: Estimate
    digits: Estimate
    nll: Estimate
    kl: Estimate
    agreement: Estimate
    bits_per_element: float | None
    cache_bits_per_element: float
    depths: list[NeedleCell]
    trials: list[dict[str, Any]]


@dataclass(frozen=True)
class NeedleReport:
    """What was measured, on what; `to_dict()` gives plain builtins."""

    settings: dict[str, Any]
    rows: tuple[NeedleRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins, fit for JSON."""
        return {"kind": "needle", "settings": self.settings, "results": [asdict(row) for row in self.rows]}


# ------------------------------------------------------------------------------------------------ the questions


def plan(loaded: LoadedModel, text: Sequence[int], options: NeedleOptions) -> tuple[Question, ...]:
    """Make all questions, and refuse now what cannot work later.

    Raises:
        OptionValueError: the model's context or the text is too short, or a context for what must be in it.
        UnsupportedError: a cache cannot be used with this model, or its tokenizer has no digits.
    """
    intervals.require_scipy()
    for context in options.contexts:
        loaded.check_context("contexts", context)
    for candidate in options.candidates:
        candidate.make(loaded.model.config)
    if not any(map(_digits, map(loaded.tokenizer.decode, loaded.encode("0123456789")))):
        raise UnsupportedError(f"the tokenizer of {loaded.name!r}", ["it has no digits, which keys are made of"])
    ask = functools.partial(pose, loaded.encode, text, loaded.prefix, options.sentences, seed=options.seed)
    return tuple(
        ask(context=context, depth=depth, trial=trial)
        for context in options.contexts
        for depth in options.depths
        for trial in range(options.trials)
    )


def work(questions: Sequence[Question], options: NeedleOptions) -> int:
    """Return how much there is to do, for a progress bar: tokens."""
    return sum(question.context for question in questions) * len(options.candidates)


def run_settings(loaded: LoadedModel, text: Sequence[int], options: NeedleOptions) -> dict[str, Any]:
    """Return all that results depend on, for a journal."""
    mine = {"evaluation": "needle", "text": hash_tokens(text), "prefix": loaded.prefix}
    return {**mine, **options.settings(), "model": loaded.settings()}


# ------------------------------------------------------------------------------------------------ asking


def measure_needle(
    loaded: LoadedModel,
    questions: Sequence[Question],
    options: NeedleOptions,
    journal: Journal,
    progress: Progress = lambda _: None,
) -> NeedleReport:
    """Ask what is not in the journal yet, and sum everything up.

    Args:
        loaded: the model.
        questions: those of `plan`.
        options: what to measure.
        journal: opened with `run_settings`.
        progress: told how far the work is.

    Raises:
        OutOfMemoryError: memory ran out; finished parts are in the journal.
    """
    journal.run(
        _parts(loaded, questions, options),
        lambda key: progress(int(key[0])),
        advice="shorter --contexts, a smaller --dtype or a smaller model",
    )
    return NeedleReport(journal.settings, tuple(_rows(journal, questions, options)))


def _parts(
    loaded: LoadedModel, questions: Sequence[Question], options: NeedleOptions
) -> Iterator[tuple[Key, Callable[[], Any]]]:
    for question in questions:
        subject = _Asked(loaded, question, options)
        for candidate in options.candidates:
            yield _key(question, candidate.label), functools.partial(subject.score, candidate)


def _key(question: Question, label: str) -> Key:
    return question.context, question.depth, question.trial, label


class _Asked:
    """One question, asked through one cache after another. What is the same for all is worked out once."""

    def __init__(self, loaded: LoadedModel, question: Question, options: NeedleOptions) -> None:
        self._loaded, self._question, self._options = loaded, question, options
        self._tokens = question.tokens.to(loaded.device)
        behind = question.answer + (0 if options.prefill_question else question.asked)
        self._prefill = Prefill(loaded.model, self._tokens[:, :-behind])

    @functools.cached_property
    def _full(self) -> tuple[Tensor, int, float]:
        """Logits ``[answer, vocabulary]`` through the full-precision cache, its numbers and its bits for each."""
        cache = self._options.candidates[0].make(self._loaded.model.config)
        logits = self._logits(cache)
        numbers = elements(cache)
        return logits, numbers, cache_bits(cache, numbers)

    def _logits(self, cache: Any) -> Tensor:
        """Return what the model expects at each token of the answer, logits ``[answer, vocabulary]``."""
        fed = forced_logits(self._loaded.model, cache, self._tokens, self._prefill, one_by_one=self._options.one_by_one)
        return torch.cat(list(fed))[-1 - self._question.answer : -1]

    def score(self, candidate: Candidate) -> dict[str, Any]:
        """Return the part's result, in plain builtins."""
        full, numbers, full_bits = self._full
        torch.manual_seed(self._options.seed)  # what a method draws must not depend on what was done before
        if candidate.kind == FULL:
            return {**self._scores(full), "bits": full_bits, "cache_bits": full_bits}
        cache = candidate.make(self._loaded.model.config)
        scores = self._scores(self._logits(cache))
        return {**scores, "bits": body_bits(cache), "cache_bits": cache_bits(cache, numbers)}

    def _scores(self, logits: Tensor) -> dict[str, Any]:
        targets = self._question.answer_ids.to(logits.device)
        nll, kl, agreed = score_sums(self._full[0], logits, targets).tolist()
        said = logits.argmax(-1)
        right = (said == targets).tolist()
        digits = [_digits(self._loaded.tokenizer.decode([token])) for token in targets.tolist()]
        return {
            "answer": self._loaded.tokenizer.decode(said.tolist()).strip(),
            "retrieved": all(right),
            "digits": sum(count for count, good in zip(digits, right, strict=True) if good) / sum(digits),
            "nll": nll,
            "kl": kl / len(targets),
            "agreement": agreed / len(targets),
        }


def _digits(text: str) -> int:
    return sum(character.isdecimal() for character in text)


# ------------------------------------------------------------------------------------------------ summing up


def _rows(journal: Journal, questions: Sequence[Question], options: NeedleOptions) -> Iterator[NeedleRow]:
    for context in options.contexts:
        asked = [question for question in questions if question.context == context]
        for candidate in options.candidates:
            parts = [journal[_key(question, candidate.label)] for question in asked]
            yield _row(candidate.label, asked, parts, options)


def _row(label: str, asked: Sequence[Question], parts: Sequence[dict[str, Any]], options: NeedleOptions) -> NeedleRow:
    def estimate(name: str) -> Estimate:
        return intervals.estimate(intervals.mean, _column(parts, name), seed=options.seed)

    bits = [part["bits"] for part in parts if part["bits"] is not None]
    trials = [
        {"depth": question.depth, "key": question.key, **{name: part[name] for name in _FIGURES}}
        for question, part in zip(asked, parts, strict=True)
    ]
    return NeedleRow(
        cache=label,
        context=asked[0].context,
        questions=len(asked),
        retrieved=_share(parts),
        digits=estimate("digits"),
        nll=estimate("nll"),
        kl=estimate("kl"),
        agreement=estimate("agreement"),
        bits_per_element=sum(bits) / len(bits) if bits else None,
        cache_bits_per_element=_mean(parts, "cache_bits"),
        depths=[_cell(depth, [one for one in trials if one["depth"] == depth]) for depth in options.depths],
        trials=trials,
    )


#: What is kept of each question.
_FIGURES = ("answer", "retrieved", "digits", "nll", "kl", "agreement")


def _cell(depth: int, parts: Sequence[dict[str, Any]]) -> NeedleCell:
    figures = {name: _mean(parts, name) for name in ("digits", "nll", "kl", "agreement")}
    return NeedleCell(depth=depth, retrieved=_share(parts), **figures)


def _share(parts: Sequence[dict[str, Any]]) -> Estimate:
    return intervals.proportion(sum(part["retrieved"] for part in parts), len(parts))


def _mean(parts: Sequence[dict[str, Any]], name: str) -> float:
    return sum(_column(parts, name)) / len(parts)


def _column(parts: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [part[name] for part in parts]

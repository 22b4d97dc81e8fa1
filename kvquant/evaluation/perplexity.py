"""Perplexity, KL divergence and agreement of caches, through the cache, one new token at a time.

A text is cut into windows. Each begins with a prefill, after which every further token is fed through the cache and the
model's expectation of the next one is scored: against the text, and against what it would have expected with the
full-precision cache. Windows advance by the number of scored tokens, so that each token of the text behind the first
prefill is scored once at every context length.

With ``p`` the distribution of the next token through the full-precision cache, ``q`` that through the quantised one,
and means over all scored positions:

- perplexity: ``exp(mean -log q(next token))``;
- KL divergence: ``mean sum_v p(v) (log p(v) - log q(v))``, in nats (Kullback and Leibler, 1951);
- agreement: share of positions at which both have the same likeliest token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvquant.errors import OptionValueError
from kvquant.evaluation import intervals
from kvquant.evaluation.candidates import FULL, Candidate, body_bits, cache_bits, elements
from kvquant.evaluation.intervals import Estimate
from kvquant.evaluation.journal import Journal, Key
from kvquant.evaluation.loading import LoadedModel, hash_tokens
from kvquant.evaluation.teacher import Prefill, forced_logits, one_pass_logits

#: Rows of logits that are scored at once, in float64.
_ROWS = 32

#: What needs less memory beside shorter windows.
NEEDS_LESS = "a longer --prefill (fewer scored tokens), a smaller --dtype or a smaller model"

#: Called as work goes on, with the number of tokens that were fed since the last call.
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """What to measure.

    Attributes:
        candidates: the caches, full precision first.
        contexts: tokens in the cache at the end of a window.
        prefill: tokens that are fed in one pass at the start of a window; None takes half of each context.
        windows: windows of each context at most, None for as many as the text has.
        one_by_one: feed one token at a time. Otherwise as many at once as makes no difference but rounding.
        one_pass: measure one forward pass over quantised and dequantised states as well, to show how it differs.
        versus: label of the cache to whose KL divergence those of the others are compared, pair by pair; or None.
        seed: of the bootstrap, and of what methods draw.

    Raises:
        OptionValueError: a value can never work.
    """

    candidates: tuple[Candidate, ...]
    contexts: tuple[int, ...] = (512, 1024, 2048)
    prefill: int | None = None
    windows: int | None = None
    one_by_one: bool = False
    one_pass: bool = False
    versus: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) < 2:
            raise OptionValueError("contexts", self.contexts, "numbers of tokens, at least 2")
        if self.prefill is not None and not 1 <= self.prefill < min(self.contexts):
            raise OptionValueError(
                "prefill", self.prefill, f"1 to {min(self.contexts) - 1} tokens, below every context"
            )
        if self.windows is not None and self.windows < 1:
            raise OptionValueError("windows", self.windows, "at least 1")
        labels = [candidate.label for candidate in self.candidates]
        if self.versus is not None and self.versus not in labels[1:]:
            raise OptionValueError("versus", self.versus, f"one of the caches compared: {', '.join(labels[1:])}")

    def prefill_of(self, context: int) -> int:
        """Return the tokens of the prefill of windows of `context` tokens."""
        return context // 2 if self.prefill is None else self.prefill

    def settings(self) -> dict[str, Any]:
        """Return what results of parts depend on, in plain builtins."""
        return {
            "contexts": list(self.contexts),
            "prefill": self.prefill,
            "windows": self.windows,
            "one_by_one": self.one_by_one,
            "one_pass": self.one_pass,
            "seed": self.seed,
            "caches": {candidate.label: candidate.settings() for candidate in self.candidates},
        }


@dataclass(frozen=True)
class PerplexityRow:
    """One cache at one context length.

    Attributes:
        cache: its label.
        context: tokens in the cache at the end of a window.
        prefill: tokens of those that were fed in one pass.
        tokens: scored tokens in all.
        perplexity: with its interval.
        difference: perplexity less that of full precision.
        change: perplexity over that of full precision, less 1.
        kl: KL divergence to full precision in nats.
        agreement: share of positions whose likeliest token is that of full precision.
        kl_ratio: KL divergence over that of the cache named by `versus`, None without.
        bits_per_element: of what is quantised (codes, scales, offsets, tables), as measured; those of the type for
            full precision; None where nothing was quantised.
        cache_bits_per_element: of everything that the cache holds at the end of a window: window, sink and spare room
            too.
        one_pass: perplexity, KL divergence and agreement of one forward pass over quantised and dequantised states.
        windows: negative log-likelihood, KL divergence and agreement of each window, for comparisons of one's own.
    """

    cache: str
    context: int
    prefill: int
    tokens: int
    perplexity: Estimate
    difference: Estimate
    change: Estimate
    kl: Estimate
    agreement: Estimate
    kl_ratio: Estimate | None
    bits_per_element: float | None
    cache_bits_per_element: float
    one_pass: dict[str, float] | None
    windows: list[dict[str, float]]


@dataclass(frozen=True)
class PerplexityReport:
    """What was measured, on what; `to_dict()` gives plain builtins."""

    settings: dict[str, Any]
    rows: tuple[PerplexityRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins, fit for JSON."""
        return {"kind": "perplexity", "settings": self.settings, "results": [asdict(row) for row in self.rows]}


# ------------------------------------------------------------------------------------------------ the text


@dataclass(frozen=True)
class Windows:
    """A text as tokens, cut into windows of one context length.

    Attributes:
        context: tokens that are fed.
        prefill: the first of them, fed in one pass.
        tokens: int64 ``[windows, context + 1]``; the last token of each is only a target.
        first: number of the first of them, from 0, where they are some of a text's windows.
    """

    context: int
    prefill: int
    tokens: Tensor
    first: int = 0

    @property
    def numbers(self) -> range:
        """Numbers of the windows in their text."""
        return range(self.first, self.first + len(self.tokens))

    @property
    def scored(self) -> int:
        """Tokens that are scored in each window."""
        return self.context - self.prefill


def cut(text: Sequence[int], prefix: Sequence[int], context: int, prefill: int, most: int | None = None) -> Windows:
    """Cut a text into windows, each of which begins with `prefix` and goes on where the one before stopped scoring.

    Raises:
        OptionValueError: the text is too short for one window, or the prefix does not leave room for a token.
    """
    if len(prefix) >= prefill:
        raise OptionValueError("prefill", prefill, f"more than the {len(prefix)} tokens that begin every text")
    length, step = context + 1 - len(prefix), context - prefill
    if len(text) < length:
        raise OptionValueError("text", f"{len(text)} tokens", f"at least {length} tokens for a context of {context}")
    count = (len(text) - length) // step + 1
    starts = range(0, step * min(count, most or count), step)
    return Windows(context, prefill, torch.tensor([[*prefix, *text[start : start + length]] for start in starts]))


def plan(loaded: LoadedModel, text: Sequence[int], options: PerplexityOptions) -> tuple[Windows, ...]:
    """Cut the text for every context, and refuse now what cannot work later.

    Raises:
        OptionValueError: the text is too short, or the model's context.
        UnsupportedError: a cache cannot be used with this model.
    """
    intervals.require_scipy()
    for context in options.contexts:
        loaded.check_context("contexts", context)
    for candidate in options.candidates:
        candidate.make(loaded.model.config)
    prefix = loaded.prefix
    return tuple(
        cut(text, prefix, context, options.prefill_of(context), options.windows) for context in options.contexts
    )


def work(windows: Sequence[Windows], options: PerplexityOptions) -> int:
    """Return how much there is to do, for a progress bar: tokens."""
    return sum(one.context * len(one.tokens) for one in windows) * len(options.candidates)


def run_settings(loaded: LoadedModel, text: Sequence[int], options: PerplexityOptions) -> dict[str, Any]:
    """Return all that results depend on, for a journal."""
    mine = {"evaluation": "perplexity", "text": hash_tokens(text), "prefix": loaded.prefix}
    return {**mine, **options.settings(), "model": loaded.settings()}


# ------------------------------------------------------------------------------------------------ scoring


def measure_perplexity(
    loaded: LoadedModel,
    text: Sequence[int],
    options: PerplexityOptions,
    journal: Journal,
    progress: Progress = lambda _: None,
) -> PerplexityReport:
    """Measure what is not in the journal yet, and sum everything up.

    Args:
        loaded: the model.
        text: the text's tokens, without those that begin every text.
        options: what to measure.
        journal: opened with `run_settings`.
        progress: told how far the work is.

    Raises:
        OptionValueError, UnsupportedError: see `plan`.
        OutOfMemoryError: memory ran out; finished parts are in the journal.
    """
    planned = plan(loaded, text, options)
    score_windows(loaded, planned, options, journal, progress, advice=f"shorter --contexts, {NEEDS_LESS}")
    return PerplexityReport(journal.settings, tuple(_rows(journal, planned, options)))


def score_windows(
    loaded: LoadedModel,
    planned: Sequence[Windows],
    options: PerplexityOptions,
    journal: Journal,
    progress: Progress = lambda _: None,
    *,
    advice: str,
) -> None:
    """Score windows through every cache, as far as they are not in the journal yet.

    Their results are ``journal[context, number of the window, label of the cache]``: ``{"nll", "kl", "agreement"}``,
    means over the window's scored tokens, and ``"bits"`` and ``"cache_bits"`` for each element.

    Args:
        loaded: the model.
        planned: the windows.
        options: the caches, and how they are fed.
        journal: where results go.
        progress: told how far the work is.
        advice: what would need less memory, by the caller's own options.

    Raises:
        OutOfMemoryError: memory ran out; finished parts are in the journal.
    """
    journal.run(_parts(loaded, planned, options), lambda key: progress(int(key[0])), advice=advice)


def _parts(
    loaded: LoadedModel, planned: Sequence[Windows], options: PerplexityOptions
) -> Iterator[tuple[Key, Callable[[], Any]]]:
    for windows in planned:
        for index, number in enumerate(windows.numbers):
            subject = _Window(loaded, windows, index, options)
            for candidate in options.candidates:
                yield (windows.context, number, candidate.label), functools.partial(subject.score, candidate)


class _Window:
    """One window, scored through one cache after another. What full precision says of it is worked out once."""

    def __init__(self, loaded: LoadedModel, windows: Windows, index: int, options: PerplexityOptions) -> None:
        self._loaded, self._options = loaded, options
        self._tokens = windows.tokens[index : index + 1].to(loaded.device)
        self._prefill = windows.prefill
        self._first_pass = Prefill(loaded.model, self._tokens[:, : windows.prefill])

    @functools.cached_property
    def _full(self) -> tuple[Tensor, int, float]:
        """Logits ``[scored, vocabulary]`` through the full-precision cache, its numbers and its bits for each."""
        cache = self._options.candidates[0].make(self._loaded.model.config)
        logits = torch.cat(list(self._logits(cache)))
        numbers = elements(cache)
        return logits, numbers, cache_bits(cache, numbers)

    def _logits(self, cache: Any) -> Iterator[Tensor]:
        """Yield logits ``[some, vocabulary]`` after each token behind the prefill."""
        found = forced_logits(
            self._loaded.model, cache, self._tokens[:, :-1], self._first_pass, one_by_one=self._options.one_by_one
        )
        next(found)  # what the prefill alone expects has not been through the cache
        return found

    def score(self, candidate: Candidate) -> dict[str, Any]:
        """Return the part's result, in plain builtins."""
        full, numbers, full_bits = self._full
        torch.manual_seed(self._options.seed)  # what a method draws must not depend on what was done before
        if candidate.kind == FULL:
            return {**self._scores(iter([full])), "bits": full_bits, "cache_bits": full_bits}
        cache = candidate.make(self._loaded.model.config)
        result: dict[str, Any] = self._scores(self._logits(cache))
        result |= {"bits": body_bits(cache), "cache_bits": cache_bits(cache, numbers)}
        if self._options.one_pass:
            cache = candidate.make(self._loaded.model.config)
            logits = one_pass_logits(self._loaded.model, cache, self._tokens[:, :-1], self._prefill)
            result["one_pass"] = self._scores(iter([logits]))
        return result

    def _scores(self, chunks: Iterator[Tensor]) -> dict[str, float]:
        full, targets = self._full[0], self._tokens[0, self._prefill + 1 :]
        sums = torch.zeros(3, dtype=torch.float64)
        at = 0
        for chunk in chunks:
            for rows in chunk.split(_ROWS):
                sums += score_sums(full[at : at + len(rows)], rows, targets[at : at + len(rows)])
                at += len(rows)
        nll, kl, agreed = (sums / len(targets)).tolist()
        return {"nll": nll, "kl": kl, "agreement": agreed}


def score_sums(full: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sums over rows of negative log-likelihood, KL divergence and agreement.

    Args:
        full, logits: ``[rows, vocabulary]``.
        targets: int64 ``[rows]``.
    """
    # A KL divergence of 1e-7 is lost in the rounding of float32; some devices have nothing wider.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    p, q = full.to(wide).log_softmax(-1), logits.to(wide).log_softmax(-1)
    nll = -q.gather(1, targets[:, None]).sum()
    kl = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    agreed = (p.argmax(-1) == q.argmax(-1)).sum()
    return torch.stack([nll, kl, agreed.to(wide)]).to("cpu", torch.float64)


# ------------------------------------------------------------------------------------------------ summing up


def _rows(journal: Journal, planned: Sequence[Windows], options: PerplexityOptions) -> Iterator[PerplexityRow]:
    for windows in planned:
        found = {
            candidate.label: [journal[windows.context, number, candidate.label] for number in windows.numbers]
            for candidate in options.candidates
        }
        for label in found:
            yield _row(label, windows, found, options)


def _row(
    label: str, windows: Windows, found: dict[str, list[dict[str, Any]]], options: PerplexityOptions
) -> PerplexityRow:
    mine = found[label]
    estimate = functools.partial(intervals.estimate, seed=options.seed)
    nll, base = _column(mine, "nll"), _column(found[options.candidates[0].label], "nll")
    kl = _column(mine, "kl")
    rival = None if options.versus is None else _column(found[options.versus], "kl")
    bits = [part["bits"] for part in mine if part["bits"] is not None]
    return PerplexityRow(
        cache=label,
        context=windows.context,
        prefill=windows.prefill,
        tokens=windows.scored * len(mine),
        perplexity=estimate(intervals.perplexity, nll),
        difference=estimate(intervals.perplexity_difference, nll, base),
        change=estimate(intervals.perplexity_change, nll, base),
        kl=estimate(intervals.mean, kl),
        agreement=estimate(intervals.mean, _column(mine, "agreement")),
        kl_ratio=None if rival is None or not any(rival) else estimate(intervals.ratio_of_means, kl, rival),
        bits_per_element=sum(bits) / len(bits) if bits else None,
        cache_bits_per_element=sum(_column(mine, "cache_bits")) / len(mine),
        one_pass=_one_pass([part["one_pass"] for part in mine if "one_pass" in part]),
        windows=[{name: part[name] for name in ("nll", "kl", "agreement")} for part in mine],
    )


def _one_pass(scores: list[dict[str, float]]) -> dict[str, float] | None:
    if not scores:
        return None
    nll, kl, agreement = (sum(_column(scores, name)) / len(scores) for name in ("nll", "kl", "agreement"))
    return {"perplexity": math.exp(nll), "kl": kl, "agreement": agreement}


def _column(parts: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [part[name] for part in parts]

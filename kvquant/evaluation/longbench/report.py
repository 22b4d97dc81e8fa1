"""Summing up: scores, KL divergence and agreement of each cache on each task, and over all tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvquant.evaluation import intervals
from kvquant.evaluation.intervals import Estimate
from kvquant.evaluation.longbench.published import PublishedScore, published_scores
from kvquant.evaluation.longbench.tasks import BUCKETS, OVERALL, Task, bucket_of

#: (cache, task) -> the results of the task's questions.
Found = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Bucket:
    """The score on texts of some lengths, for tasks of LongBench-E.

    Attributes:
        name: the lengths in words, such as ``0-4k``.
        questions: how many there are.
        score: from 0 to 100.
    """

    name: str
    questions: int
    score: float


@dataclass(frozen=True)
class LongBenchRow:
    """One cache on one task, or over all tasks.

    Attributes:
        cache: its label.
        task: the task's name, or `OVERALL`: there every figure is the mean of the tasks' figures, each of which counts
            alike, and questions are drawn again within their task.
        metric: how the task is scored; empty over all tasks.
        questions: how many were asked.
        score: the benchmark's, from 0 to 100.
        difference: the score less that of full precision.
        kl: KL divergence to full precision in nats, along full precision's answers; None where all of these have one
            token.
        agreement: share of their tokens whose first choice is that of full precision; likewise.
        bits_per_element: of what is quantised (codes, scales, offsets, tables), as measured; those of the type for
            full precision; None where nothing was quantised.
        cache_bits_per_element: of everything that the cache holds at the end of full precision's answer: window, sink
            and spare room too.
        truncated: questions whose prompt lost its middle.
        buckets: scores by length, for tasks of LongBench-E.
        published: what others reported for this model on this task; with full precision's rows only.
        answers: for each question its id, what the model said, its score (from 0 to 1), KL divergence and agreement,
            and the tokens of its prompt.
    """

    cache: str
    task: str
    metric: str
    questions: int
    score: Estimate
    difference: Estimate
    kl: Estimate | None
    agreement: Estimate | None
    bits_per_element: float | None
    cache_bits_per_element: float
    truncated: int
    buckets: list[Bucket]
    published: list[PublishedScore]
    answers: list[dict[str, Any]]


@dataclass(frozen=True)
class LongBenchReport:
    """What was measured, on what; `to_dict()` gives plain builtins."""

    settings: dict[str, Any]
    rows: tuple[LongBenchRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins, fit for JSON."""
        return {"kind": "longbench", "settings": self.settings, "results": [asdict(row) for row in self.rows]}


def summarise(
    model: str, tasks: Sequence[Task], labels: Sequence[str], found: Found, seed: int
) -> tuple[LongBenchRow, ...]:
    """Return a row for each task and cache, and where there are several tasks one over all for each cache.

    Args:
        model: the name of the model, for what others reported.
        tasks: the tasks.
        labels: the caches, full precision first.
        found: what came out for each question.
        seed: of the bootstrap.
    """
    rows = [_row(model, task, label, labels[0], found, seed) for task in tasks for label in labels]
    if len(tasks) > 1:
        rows += [_overall(tasks, label, labels[0], found, seed) for label in labels]
    return tuple(rows)


def _row(model: str, task: Task, label: str, full: str, found: Found, seed: int) -> LongBenchRow:
    mine, base = found[label, task.name], found[full, task.name]
    bits = _present(mine, "bits")
    return LongBenchRow(
        cache=label,
        task=task.name,
        metric=task.metric,
        questions=len(mine),
        **_estimates([mine], [base], seed),
        bits_per_element=sum(bits) / len(bits) if bits else None,
        cache_bits_per_element=_mean(mine, "cache_bits"),
        truncated=sum(part["truncated"] for part in mine),
        buckets=list(_buckets(mine)) if task.by_length else [],
        published=published_scores(model, task.name) if label == full else [],
        answers=[{name: part[name] for name in _FIGURES} for part in mine],
    )


#: What is kept of each question.
_FIGURES = ("id", "answer", "score", "kl", "agreement", "prompt")


def _overall(tasks: Sequence[Task], label: str, full: str, found: Found, seed: int) -> LongBenchRow:
    mine = [found[label, task.name] for task in tasks]
    bits = [_average(present) for parts in mine if (present := _present(parts, "bits"))]
    return LongBenchRow(
        cache=label,
        task=OVERALL,
        metric="",
        questions=sum(map(len, mine)),
        **_estimates(mine, [found[full, task.name] for task in tasks], seed),
        bits_per_element=_average(bits) if bits else None,
        cache_bits_per_element=_average([_mean(parts, "cache_bits") for parts in mine]),
        truncated=sum(part["truncated"] for parts in mine for part in parts),
        buckets=[],
        published=[],
        answers=[],
    )


def _estimates(
    tasks: Sequence[Sequence[Mapping[str, Any]]], base: Sequence[Sequence[Mapping[str, Any]]], seed: int
) -> dict[str, Any]:
    """Return score, difference, KL divergence and agreement over some tasks, each of which counts alike."""

    def estimate(samples: list[list[float]]) -> Estimate | None:
        samples = [sample for sample in samples if sample]
        if not samples:
            return None
        return intervals.estimate(intervals.mean_of_means, *samples, seed=seed, paired=False)

    scores, full = ([[100 * part["score"] for part in parts] for parts in those] for those in (tasks, base))
    differences = [[mine - other for mine, other in zip(*pair, strict=True)] for pair in zip(scores, full, strict=True)]
    return {
        "score": estimate(scores),
        "difference": estimate(differences),
        "kl": estimate([_present(parts, "kl") for parts in tasks]),
        "agreement": estimate([_present(parts, "agreement") for parts in tasks]),
    }


def _buckets(parts: Sequence[Mapping[str, Any]]) -> Iterator[Bucket]:
    for name, _ in BUCKETS:
        scores = [100 * part["score"] for part in parts if bucket_of(part["length"]) == name]
        if scores:
            yield Bucket(name, len(scores), _average(scores))


def _present(parts: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [part[name] for part in parts if part[name] is not None]


def _mean(parts: Sequence[Mapping[str, Any]], name: str) -> float:
    return _average([part[name] for part in parts])


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)

"""The tasks: how each is scored, and what its prompts and answers need."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from kvquant.errors import OptionValueError, UnknownOptionError

#: What a row calls the mean over all tasks.
OVERALL = "mean of the tasks"
#: How LongBench-E's files are called: a task's name and this.
E_SUFFIX = "_e"


@dataclass(frozen=True)
class Task:
    """A task of LongBench.

    Attributes:
        name: its name, which is that of its file too; LongBench-E's end in ``_e``.
        base: the name without that, under which prompts and lengths are found.
        kind: what kind of task it is, in the words of the benchmark.
        metric: how it is scored, a key of `METRICS`.
        chat: whether the prompt goes through the model's chat template. ``pred.py`` leaves the few-shot and code tasks
            without: their prompts end in the middle of a pattern that the model must go on with.
        first_line: whether the first line of what the model says is scored alone, as ``scorer`` in ``eval.py`` does.
        one_line: whether generation stops at a line's end, as ``pred.py`` does for SAMSum.
    """

    name: str
    base: str
    kind: str
    metric: str
    chat: bool = True
    first_line: bool = False
    one_line: bool = False

    @property
    def by_length(self) -> bool:
        """Whether it is one of LongBench-E, whose scores are told apart by the length of the text."""
        return self.name != self.base


#: Metric -> what it is called.
METRIC_NAMES = {
    "qa_f1": "F1",
    "rouge_l": "ROUGE-L",
    "classification": "accuracy",
    "retrieval": "accuracy",
    "count": "accuracy",
    "code_similarity": "edit similarity",
}

_SINGLE, _MULTI, _SUMMARY = "single-document QA", "multi-document QA", "summarisation"
_FEW_SHOT, _SYNTHETIC, _CODE = "few-shot learning", "synthetic", "code completion"

_TASKS = (
    Task("narrativeqa", "narrativeqa", _SINGLE, "qa_f1"),
    Task("qasper", "qasper", _SINGLE, "qa_f1"),
    Task("multifieldqa_en", "multifieldqa_en", _SINGLE, "qa_f1"),
    Task("hotpotqa", "hotpotqa", _MULTI, "qa_f1"),
    Task("2wikimqa", "2wikimqa", _MULTI, "qa_f1"),
    Task("musique", "musique", _MULTI, "qa_f1"),
    Task("gov_report", "gov_report", _SUMMARY, "rouge_l"),
    Task("qmsum", "qmsum", _SUMMARY, "rouge_l"),
    Task("multi_news", "multi_news", _SUMMARY, "rouge_l"),
    Task("trec", "trec", _FEW_SHOT, "classification", chat=False, first_line=True),
    Task("triviaqa", "triviaqa", _FEW_SHOT, "qa_f1", chat=False, first_line=True),
    Task("samsum", "samsum", _FEW_SHOT, "rouge_l", chat=False, first_line=True, one_line=True),
    Task("passage_count", "passage_count", _SYNTHETIC, "count"),
    Task("passage_retrieval_en", "passage_retrieval_en", _SYNTHETIC, "retrieval"),
    Task("lcc", "lcc", _CODE, "code_similarity", chat=False),
    Task("repobench-p", "repobench-p", _CODE, "code_similarity", chat=False),
)
#: The tasks that LongBench-E has too (``pred.py``, with ``--e``).
_IN_E = (
    "qasper multifieldqa_en hotpotqa 2wikimqa gov_report multi_news trec triviaqa samsum passage_count "
    "passage_retrieval_en lcc repobench-p"
).split()


def _of_e(task: Task) -> Task:
    # SAMSum stops at a line's end in LongBench-E too: pred.py asks for the name without the suffix.
    return dataclasses.replace(task, name=task.name + E_SUFFIX)


#: Every task by name, the benchmark's own in its order, then LongBench-E's.
TASKS: dict[str, Task] = {task.name: task for task in (*_TASKS, *(_of_e(one) for one in _TASKS if one.name in _IN_E))}

#: Texts of fewer words than these are in the bucket, the last has all others (``scorer_e`` in ``eval.py``).
BUCKETS: tuple[tuple[str, int | None], ...] = (("0-4k", 4000), ("4-8k", 8000), ("8k+", None))


def parse_tasks(text: str) -> tuple[Task, ...]:
    """Read tasks separated by commas.

    Raises:
        UnknownOptionError: there is no such task.
        OptionValueError: one comes twice, or there is none.
    """
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name and name not in TASKS:
            raise UnknownOptionError("task", name, TASKS)
    if not all(names) or len(set(names)) < len(names):
        raise OptionValueError("tasks", text, "names separated by commas, each once, such as trec,samsum,hotpotqa")
    return tuple(TASKS[name] for name in names)


def bucket_of(length: int) -> str:
    """Return the bucket that a text of `length` words is in."""
    return next(name for name, end in BUCKETS if end is None or length < end)


def metrics_of(tasks: Sequence[Task]) -> set[str]:
    """Return the names of the metrics that some tasks need."""
    return {task.metric for task in tasks}

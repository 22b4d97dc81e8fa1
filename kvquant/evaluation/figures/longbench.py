"""The picture of `kvquant eval longbench`: scores and KL divergence, task by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvquant.evaluation.figures import MARKERS
from kvquant.evaluation.longbench.tasks import METRIC_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvquant.evaluation.intervals import Estimate
    from kvquant.evaluation.longbench.report import LongBenchReport, LongBenchRow

#: Inches that a task takes, and each cache within it.
_TASK, _CACHE = 0.2, 0.1
#: Share of a task's height over which its caches are spread.
_SPREAD = 0.7


def draw(report: LongBenchReport) -> Figure:
    """Draw scores (left) and KL divergences to full precision (right), tasks from top to bottom.

    A point for each cache, with its confidence interval; grey signs are what others published for the model.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.task for row in report.rows))
    caches = list(dict.fromkeys(row.cache for row in report.rows))
    height = 1.6 + len(tasks) * (_TASK + _CACHE * len(caches)) + 0.2 * len(caches) / 3
    figure = Figure(figsize=(11, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for index, cache in enumerate(caches):
        rows = [row for row in report.rows if row.cache == cache]
        heights = [tasks.index(row.task) + _offset(index, len(caches)) for row in rows]
        style: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "color": f"C{index % 10}"}
        _points(left, heights, [row.score for row in rows], label=cache, **style)
        _points(right, heights, [row.kl if index else None for row in rows], factor=1000, **style)
    _published(left, tasks, report.rows)
    left.set_yticks(range(len(tasks)), [_named(task, report.rows) for task in tasks], fontsize=8)
    left.set_ylim(len(tasks) - 0.5, -0.5)
    low, high = left.get_xlim()
    left.set_xlim(max(-2, low - 2), min(102, high + 2))
    left.ticklabel_format(axis="x", useOffset=False)
    left.set_xlabel("score, 0 to 100")
    right.set_xlabel("KL divergence to full precision, 1/1000 nat")
    if any(row.kl is not None and row.kl.value > 0 for row in report.rows):
        right.set_xscale("log")
        right.xaxis.set_major_formatter("{x:g}")
    for panel in (left, right):
        panel.grid(visible=True, axis="x", which="major", alpha=0.3)
        for boundary in range(1, len(tasks)):
            panel.axhline(boundary - 0.5, color="black", alpha=0.15, linewidth=0.6)
    named = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    labels = [*caches, *(label for label in named if label not in caches)]
    figure.legend(
        [named[label] for label in labels], labels, loc="outside lower left", ncols=3, fontsize=8, frameon=False
    )
    return figure


def _offset(index: int, count: int) -> float:
    return _SPREAD * (index - (count - 1) / 2) / max(1, count - 1)


def _points(
    panel: Axes, heights: Sequence[float], figures: Sequence[Estimate | None], factor: float = 1, **style: Any
) -> None:
    shown = [
        (at, one)
        for at, one in zip(heights, figures, strict=True)
        if one is not None and (one.value or "label" in style)
    ]
    if not shown:
        return
    values = [factor * one.value for _, one in shown]
    lows = [0.0 if one.low is None else factor * max(0.0, one.value - one.low) for _, one in shown]
    highs = [0.0 if one.high is None else factor * max(0.0, one.high - one.value) for _, one in shown]
    options: dict[str, Any] = {"linestyle": "none", "markersize": 4, "elinewidth": 1, "capsize": 2, **style}
    panel.errorbar(values, [at for at, _ in shown], xerr=[lows, highs], **options)


def _published(panel: Axes, tasks: Sequence[str], rows: Sequence[LongBenchRow]) -> None:
    found = [(tasks.index(row.task), one) for row in rows for one in row.published]
    for index, cache in enumerate(dict.fromkeys(one.cache for _, one in found)):
        points = [(one.score, at) for at, one in found if one.cache == cache]
        style: dict[str, Any] = {"marker": "|x+1234"[index % 7], "color": "grey", "linestyle": "none"}
        panel.plot(*zip(*points, strict=True), label=f"published: {cache}", **style)


def _named(task: str, rows: Sequence[LongBenchRow]) -> str:
    row = next(row for row in rows if row.task == task)
    asked = "1 question" if row.questions == 1 else f"{row.questions} questions"
    return f"{task}\n{METRIC_NAMES[row.metric]}, {asked}" if row.metric else f"{task}\n{asked}"

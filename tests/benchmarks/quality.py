"""What methods and options keep, on the shipped model and on its outlier twin: the figures of docs/quality.md.

    python -m tests.benchmarks.quality --folder build/quality --pictures docs/images

Prints one table for each question and model, in Markdown, and draws one picture for each question. Every cache is
measured as `kvquant eval perplexity` and `kvquant eval needle` do it. Options that a name does not mention are those of
`SHARED`, and scales reach from the smallest to the largest number, whatever the defaults are; but where the defaults
are what is asked for. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from kvquant.cli.console import machine_line
from kvquant.demo import HELDOUT_FILE
from kvquant.engine.config import PRESETS
from kvquant.evaluation import intervals
from kvquant.evaluation.candidates import Candidate, parse_candidates
from kvquant.evaluation.figures import perplexity as bits_figure
from kvquant.evaluation.figures import save
from kvquant.evaluation.haystack import Sentences
from kvquant.evaluation.intervals import Estimate
from kvquant.evaluation.journal import Journal
from kvquant.evaluation.loading import LoadedModel, load_model
from kvquant.evaluation.measure import describe_machine
from kvquant.evaluation.needle import NeedleOptions, NeedleRow, measure_needle
from kvquant.evaluation.needle import plan as questions_of
from kvquant.evaluation.needle import run_settings as needle_settings
from kvquant.evaluation.perplexity import (
    PerplexityOptions,
    PerplexityReport,
    PerplexityRow,
    measure_perplexity,
    run_settings,
)

CONTEXT = 1024
#: KIVI's axes and window, and nothing else done to the states.
SHARED = {
    "axis_key": "channel",
    "axis_value": "token",
    "group_size": 64,
    "residual_length": 128,
    "sink_length": 0,
    "smoothing_key": False,
    "smoothing_value": False,
    "scale_bits": 16,
}
MODELS = {"model": None, "twin": 64}
DEPTHS = (0, 25, 50, 75, 100)
#: Keys under other names beside the one that is asked for: without them, caches that are told apart retrieve alike.
DISTRACTORS = 8
_COLOURS = {"model": "C0", "twin": "C3"}


@dataclass(frozen=True)
class Question:
    """Caches that answer one question, as `kvquant eval perplexity --backends` takes them.

    Attributes:
        name: of its files.
        title: what is asked.
        caches: separated by commas.
        versus: the cache that the others' KL divergence is compared with, pair by pair.
        plain: whether what a name does not mention is that of `SHARED`, and not the default.
    """

    name: str
    title: str
    caches: str
    versus: str
    plain: bool = True

    def candidates(self) -> tuple[Candidate, ...]:
        """Return the caches, under the names that they are written by."""
        if not self.plain:
            return parse_candidates(self.caches)
        return tuple(_by_range(candidate) for candidate in parse_candidates(self.caches, SHARED))


def _by_range(candidate: Candidate) -> Candidate:
    """Return a candidate whose scales are those of the range, unless it says otherwise."""
    if candidate.kind != "kvquant" or candidate.options.get("backend", "reference") != "reference":
        return candidate
    own = {"scale": "range", **candidate.options.get("options", {})}
    return replace(candidate, options={**candidate.options, "options": own})


_PLAIN = "reference:2"
_SMOOTH = ":smoothing_key=true:smoothing_value=true"
_ROTATED_VALUES, _ROTATED_KEYS = ":rotation_value=hadamard", ":rotation_key=hadamard"
_BYTES = ":scale_bits=8"
_TOGETHER = f"{_PLAIN}:scale=error{_SMOOTH}"
_ALL = f"{_SMOOTH}{_ROTATED_KEYS}{_ROTATED_VALUES}{_BYTES}"
#: Each part alone, then one after another, then in the place of another.
_ABLATION = (
    _PLAIN,
    f"{_PLAIN}:scale=error",
    f"{_PLAIN}:smoothing_key=true",
    f"{_PLAIN}:smoothing_value=true",
    f"{_PLAIN}{_SMOOTH}",
    f"{_PLAIN}{_ROTATED_VALUES}",
    f"{_PLAIN}{_ROTATED_KEYS}",
    f"{_PLAIN}{_BYTES}",
    f"{_PLAIN}:outlier_share=0.015",
    _TOGETHER,
    f"{_TOGETHER}{_BYTES}",
    f"{_TOGETHER}{_BYTES}{_ROTATED_VALUES}",
    f"{_TOGETHER}{_BYTES}{_ROTATED_VALUES}:group_size=32",
    f"{_TOGETHER}{_BYTES}{_ROTATED_VALUES}{_ROTATED_KEYS}",
    f"{_TOGETHER}{_BYTES}{_ROTATED_VALUES}{_ROTATED_KEYS}:axis_key=token",
    "lloydmax:2",
    f"lloydmax:2{_ALL}",
    f"trellis:2{_SMOOTH}{_ROTATED_VALUES}{_BYTES}",
    f"trellis:2{_ALL}",
    "hqq:2",
    f"hqq:2{_SMOOTH}{_ROTATED_VALUES}{_BYTES}",
    "kivi-2",
    "transformers:quanto:2",
    "transformers:hqq:2",
)
#: The ends of a group, the least sum of squared errors, or that of fourth powers: alone, and with the other parts.
_SCALES = (
    _PLAIN,
    *(
        f"{_PLAIN}:scale={scale}{others}"
        for others in ("", f"{_SMOOTH}{_BYTES}", f"{_SMOOTH}{_BYTES}:group_size=32")
        for scale in ("error", "fourth")
    ),
    f"{_PLAIN}{_SMOOTH}{_BYTES}",
)
_FOUR = (
    "reference:4",
    "reference:4:scale=error",
    f"reference:4:scale=error{_SMOOTH}{_ROTATED_VALUES}{_BYTES}",
    f"reference:4:scale=error{_ALL}",
    "reference:4:axis_key=token",
    f"reference:4:axis_key=token{_ROTATED_KEYS}",
    f"reference:4:axis_key=token{_SMOOTH}",
    f"reference:4:scale=error{_ALL}:axis_key=token",
    "transformers:quanto:4",
    "transformers:hqq:4",
)

QUESTIONS = (
    Question(
        "backends",
        "Which backend, at which width?",
        "reference:8:4:3:2:1,hqq:8:4:3:2:1,quanto:8:4:2,bitsandbytes:8:4,transformers:quanto:4:2,transformers:hqq:8:4:2",
        "reference:2",
    ),
    Question(
        "axes",
        "Which axes?",
        "reference:4:2,reference:4:2:axis_key=channel:axis_value=channel,"
        "reference:4:2:axis_key=token:axis_value=token,reference:4:2:axis_key=token:axis_value=channel",
        "reference:2",
    ),
    Question(
        "groups",
        "Which group size?",
        "reference:2,reference:2:group_size=32,reference:2:group_size_key=128,"
        "reference:2:group_size_key=32,reference:2:group_size_value=32",
        "reference:2",
    ),
    Question(
        "window",
        "Which window, which sink?",
        "reference:2,reference:2:residual_length=0,reference:2:residual_length=32,reference:2:sink_length=4,"
        "reference:2:residual_length=0:sink_length=4,reference:2:residual_length=32:sink_length=4",
        "reference:2",
    ),
    Question(
        "rotations",
        "Which rotation?",
        "reference:2,reference:2:rotation_key=hadamard,reference:2:rotation_value=hadamard,"
        "reference:2:rotation_key=hadamard:rotation_value=hadamard,reference:2:rotation_key=random,"
        "reference:2:axis_key=token:rotation_key=hadamard,"
        "reference:2:axis_key=token:rotation_key=hadamard:rotation_value=hadamard",
        "reference:2",
    ),
    Question(
        "split",
        "Bits for keys or for values?",
        "reference:3,reference:3:nbits_key=4:nbits_value=2,reference:3:nbits_key=2:nbits_value=4,"
        "reference:2:nbits_key=3:nbits_value=2,reference:2:nbits_key=2:nbits_value=3,"
        "reference:2:nbits_key=8:nbits_value=2,reference:4:nbits_key=8:nbits_value=4,reference:4",
        "reference:3",
    ),
    Question(
        "choice",
        "What should two bits be?",
        "reference:2,hqq:2,reference:2:sink_length=4,hqq:2:sink_length=4,reference:2:sink_length=4:rotation_key=hadamard,"
        "reference:2:sink_length=4:rotation_value=hadamard,hqq:2:sink_length=4:rotation_value=hadamard,"
        "hqq:2:sink_length=4:rotation_key=hadamard:rotation_value=hadamard,kivi-2,kivi-2:sink_length=4",
        "reference:2",
    ),
    Question("ablation", "What does each part buy, at two bits?", ",".join(_ABLATION), _PLAIN),
    Question("scales", "Which scales, at two bits?", ",".join(_SCALES), _PLAIN),
    Question("four", "And at four?", ",".join(_FOUR), "reference:4"),
    Question(
        "defaults",
        "What do the defaults keep?",
        "reference:4:3:2:1,hqq:3:2:1,quanto:2,lloydmax:3:2:1,trellis:3:2:1,kivi-2",
        "kivi-2",
        plain=False,
    ),
    Question("presets", "Which preset?", ",".join(PRESETS), "kivi-2"),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where finished parts are kept")
    parser.add_argument("--pictures", type=Path, help="where pictures go")
    parser.add_argument("--windows", type=int, default=41, help="of 1024 tokens, each with 512 scored ones")
    parser.add_argument("--trials", type=int, default=10, help=f"keys asked for at each depth of {DEPTHS}")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS))
    parser.add_argument("--questions", nargs="+", choices=[question.name for question in QUESTIONS])
    return parser.parse_args()


def measure(loaded: LoadedModel, which: str, question: Question, chosen: argparse.Namespace) -> list[PerplexityRow]:
    options = PerplexityOptions(
        candidates=question.candidates(),
        contexts=(CONTEXT,),
        windows=chosen.windows,
        versus=question.versus,
    )
    text = loaded.encode(HELDOUT_FILE.read_text("utf-8"))
    path = chosen.folder / f"{question.name}-{which}.jsonl"
    with Journal(path, run_settings(loaded, text, options)) as journal:
        return list(measure_perplexity(loaded, text, options, journal).rows)


def recall(loaded: LoadedModel, which: str, question: Question, chosen: argparse.Namespace) -> list[NeedleRow]:
    options = NeedleOptions(
        candidates=question.candidates(),
        contexts=(CONTEXT,),
        depths=DEPTHS,
        trials=chosen.trials,
        sentences=Sentences(distractors=DISTRACTORS),
    )
    text = loaded.encode(HELDOUT_FILE.read_text("utf-8"))
    path = chosen.folder / f"{question.name}-{which}-recall.jsonl"
    with Journal(path, needle_settings(loaded, text, options)) as journal:
        return list(measure_needle(loaded, questions_of(loaded, text, options), options, journal).rows)


# ------------------------------------------------------------------------------------------------ showing


def told(estimate: Estimate, digits: int, factor: float = 1, sign: str = "") -> str:
    """Write a figure and its interval with so many digits, those before the point in full."""

    def written(value: float) -> str:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:{sign},.{min(places, 6)}f}"

    value = written(factor * estimate.value)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ({written(factor * estimate.low)} to {written(factor * estimate.high)})"


def table(rows: Sequence[PerplexityRow], recalled: Sequence[NeedleRow], versus: str) -> list[str]:
    headings = ["bits", "perplexity, % more", "KL, 1/1000 nat", f"KL over `{versus}`", "agrees, %", "recalls, %"]
    lines = [f"| cache | {' | '.join(headings)} |", f"| --- |{' ---: |' * len(headings)}"]
    for row, keys in zip(rows, recalled, strict=True):
        if row.cache == "full":
            continue
        ratio = "1" if row.cache == versus or row.kl_ratio is None else told(row.kl_ratio, 2)
        bits = "-" if row.bits_per_element is None else f"{row.bits_per_element:.2f}"
        cells = [f"`{row.cache}`", bits, told(row.change, 2, 100, "+"), told(row.kl, 2, 1000), ratio]
        cells += [told(row.agreement, 3, 100), told(keys.retrieved, 2, 100)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def broken(label: str, width: int = 60) -> str:
    """Return a cache's name in lines of about so many letters, broken behind its colons."""
    lines = [""]
    for part in label.split(":"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += f"{part}:"
    return "\n".join(lines).removesuffix(":")


def draw(question: Question, found: dict[str, list[PerplexityRow]], path: Path) -> None:
    """Draw KL divergences with their intervals, a line for each cache, a colour for each model."""
    from matplotlib.figure import Figure

    labels = [row.cache for row in next(iter(found.values())) if row.cache != "full"]
    shown_labels = [broken(label) for label in labels]
    row = 0.3 + 0.09 * max(label.count("\n") for label in shown_labels)
    figure = Figure(figsize=(9, 1.4 + row * len(labels)), layout="constrained")
    panel = figure.subplots()
    for shift, (which, rows) in zip((-0.14, 0.14), found.items(), strict=False):
        shown = {row.cache: row.kl for row in rows}
        values = [1000 * shown[label].value for label in labels]
        lows = [1000 * max(0.0, shown[label].value - (shown[label].low or 0)) for label in labels]
        highs = [1000 * max(0.0, (shown[label].high or 0) - shown[label].value) for label in labels]
        places: Any = [at + shift for at in range(len(labels))]
        name = {"model": "shipped model", "twin": "its outlier twin"}[which]
        panel.errorbar(
            values, places, xerr=[lows, highs], fmt="o", markersize=5, capsize=3, label=name, color=_COLOURS[which]
        )
    panel.set_yticks(range(len(labels)), shown_labels, fontsize=7, family="monospace")
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("KL divergence, 1/1000 nat, with 95 % intervals (less is better)")
    panel.set_title(question.title, loc="left", fontsize=11)
    panel.grid(visible=True, axis="x", alpha=0.3)
    figure.legend(loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    chosen = arguments()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    questions = [question for question in QUESTIONS if chosen.questions is None or question.name in chosen.questions]
    intervals.require_scipy()
    loaded = {which: load_model(outliers=MODELS[which]) for which in chosen.models}
    found = {
        (question.name, which): measure(loaded[which], which, question, chosen)
        for which in chosen.models
        for question in track(questions, f"Measuring the {which}", console=Console(stderr=True))
    }
    recalled = {
        (question.name, which): recall(loaded[which], which, question, chosen)
        for which in chosen.models
        for question in track(questions, f"Asking the {which}", console=Console(stderr=True))
    }
    print(machine_line(describe_machine("cpu")))
    scored = chosen.windows * CONTEXT // 2
    print(
        f"\n{chosen.windows} windows of {CONTEXT} tokens, {scored} scored tokens; "
        f"{len(DEPTHS) * chosen.trials} keys among {DISTRACTORS} others in {CONTEXT} tokens; "
        "95 % intervals in brackets.\n"
    )
    for question in questions:
        print(f"### {question.title}\n")
        for which in chosen.models:
            name = loaded[which].title
            print(f"{name[0].upper()}{name[1:]}:\n")
            rows, keys = found[question.name, which], recalled[question.name, which]
            full = next(row for row in keys if row.cache == "full")
            print("\n".join(table(rows, keys, question.versus)))
            print(f"\nKeys recalled in full precision: {told(full.retrieved, 2, 100)} %.\n")
        if chosen.pictures is not None:
            by_model = {which: found[question.name, which] for which in chosen.models}
            draw(question, by_model, chosen.pictures / f"quality-{question.name}.png")
    if chosen.pictures is not None:
        for which in chosen.models:
            if rows := found.get(("backends", which)):
                save(bits_figure.draw(PerplexityReport({}, tuple(rows))), chosen.pictures / f"quality-bits-{which}.png")


if __name__ == "__main__":
    main()

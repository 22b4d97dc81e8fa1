"""Reading the benchmark's folder: its JSONL files as published, and the prompts and lengths beside them.

What LongBench publishes as ``data.zip`` holds a folder ``data`` of JSONL files, one for each task; the prompts and the
lengths of the answers are in ``config/dataset2prompt.json`` and ``config/dataset2maxlen.json`` of its repository. Each
file may lie in the folder itself, in its ``data``, or in its ``config``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvquant.demo import LONGBENCH_DIR
from kvquant.errors import MalformedLineError, OptionValueError
from kvquant.evaluation.longbench.metrics import PARAGRAPH
from kvquant.evaluation.longbench.tasks import TASKS, Task

#: A handful of rows in the benchmark's format, written for this package, that the shipped model can answer.
SAMPLE_DIR = LONGBENCH_DIR

PROMPTS, LENGTHS = "dataset2prompt.json", "dataset2maxlen.json"

#: What to say to somebody who has not got the files.
LAYOUT = (
    f"a folder with LongBench's files: {PROMPTS} and {LENGTHS} (there or in its folder config, from "
    "github.com/THUDM/LongBench, LongBench/config) and a JSONL file for each task, such as trec.jsonl (there or in its "
    "folder data, from data.zip of the data set THUDM/LongBench on the Hugging Face hub)"
)


@dataclass(frozen=True)
class Row:
    """A question of a task.

    Attributes:
        number: its place in the file, from 0.
        fields: the row as it is in the file, which prompts are made of.
        answers: true answers.
        classes: all classes, for classification.
        length: words of the text, as the file has it; None where it does not.
    """

    number: int
    fields: Mapping[str, Any]
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    length: int | None

    @property
    def name(self) -> str:
        """What identifies it in the data set, or its place in the file."""
        return str(self.fields.get("_id", self.number))


@dataclass(frozen=True)
class TaskData:
    """A task, its questions, and how they are put.

    Attributes:
        task: the task.
        prompt: the benchmark's prompt, with fields of a row in braces.
        generated: tokens of an answer at most.
        rows: the questions.
        is_sample: whether they are the shipped ones, and not the benchmark's.
    """

    task: Task
    prompt: str
    generated: int
    rows: tuple[Row, ...]
    is_sample: bool = False

    def prompt_of(self, row: Row) -> str:
        """Return the prompt for a question."""
        return self.prompt.format(**row.fields)

    def settings(self) -> dict[str, Any]:
        """Return what identifies it, in plain builtins."""
        content = json.dumps([self.prompt, [row.fields for row in self.rows]], sort_keys=True, ensure_ascii=False)
        return {
            "questions": len(self.rows),
            "generated": self.generated,
            "content": hashlib.sha256(content.encode()).hexdigest()[:16],
        }


def present_tasks(folder: Path) -> tuple[Task, ...]:
    """Return the tasks whose files are in a folder.

    Raises:
        OptionValueError: there is no such folder, or no task in it.
    """
    if not folder.is_dir():
        raise OptionValueError("data", str(folder), LAYOUT)
    found = tuple(task for task in TASKS.values() if _find(folder, f"{task.name}.jsonl", "data"))
    if not found:
        raise OptionValueError("data", str(folder), LAYOUT)
    return found


def read_tasks(folder: Path, tasks: Sequence[Task], limit: int | None = None) -> tuple[TaskData, ...]:
    """Read the questions of some tasks, their prompts and lengths.

    Args:
        folder: the benchmark's folder.
        tasks: which to read.
        limit: questions of each task at most, the first of its file.

    Raises:
        OptionValueError: a file is not there or cannot be read, or lacks a task.
        MalformedLineError: a line of a JSONL file is no question of its task.
    """
    if not folder.is_dir():
        raise OptionValueError("data", str(folder), LAYOUT)
    prompts, lengths = _read_config(folder, PROMPTS, tasks), _read_config(folder, LENGTHS, tasks)
    for task in tasks:
        if not isinstance(prompts[task.base], str):
            raise OptionValueError("data", str(folder), f"a text as the prompt of {task.base} in {PROMPTS}")
        if type(lengths[task.base]) is not int or lengths[task.base] < 1:
            raise OptionValueError("data", str(folder), f"a number of tokens for {task.base} in {LENGTHS}")
    sample = folder.resolve() == SAMPLE_DIR
    found = (
        TaskData(task, prompts[task.base], lengths[task.base], _read_rows(folder, task, limit), sample)
        for task in tasks
    )
    return tuple(_checked(folder, data) for data in found)


def _find(folder: Path, name: str, inner: str) -> Path | None:
    return next((path for path in (folder / name, folder / inner / name) if path.is_file()), None)


def _required(folder: Path, name: str, inner: str) -> Path:
    path = _find(folder, name, inner)
    if path is None:
        raise OptionValueError("data", str(folder), f"{name} in it; it is {LAYOUT}")
    return path


def _read_config(folder: Path, name: str, tasks: Sequence[Task]) -> dict[str, Any]:
    path = _required(folder, name, "config")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise OptionValueError("data", str(path), f"JSON in UTF-8 that can be read ({cause})") from cause
    if not isinstance(config, dict):
        raise OptionValueError("data", str(path), "a JSON object, task by task")
    missing = [task.base for task in tasks if task.base not in config]
    if missing:
        raise OptionValueError("data", str(path), f"an entry for {', '.join(dict.fromkeys(missing))}")
    return config


def _read_rows(folder: Path, task: Task, limit: int | None) -> tuple[Row, ...]:
    path = _required(folder, f"{task.name}.jsonl", "data")
    rows: list[Row] = []
    try:
        with path.open("rb") as file:  # lines end in a line feed alone: texts hold other signs that break lines
            for number, line in enumerate(file):
                if limit is not None and number >= limit:
                    break
                rows.append(_read_row(path, task, number, line))
    except OSError as cause:
        raise OptionValueError("data", str(path), f"a file that can be read ({cause.strerror})") from cause
    if not rows:
        raise OptionValueError("data", str(path), "a question, and the file is empty")
    return tuple(rows)


def _read_row(path: Path, task: Task, number: int, line: bytes) -> Row:
    try:
        fields = json.loads(line)
    except ValueError as cause:
        raise MalformedLineError(path, number + 1, "not JSON in UTF-8, where LongBench has a question") from cause
    problem = _problem(task, fields)
    if problem:
        raise MalformedLineError(path, number + 1, problem)
    classes = tuple(fields.get("all_classes") or ())
    return Row(number, fields, tuple(fields["answers"]), classes, fields.get("length"))


def _problem(task: Task, fields: Any) -> str | None:
    """Return what is wrong with a row, None if nothing is."""
    if not isinstance(fields, dict):
        return "no JSON object, where LongBench has a question"
    absent = [name for name in ("input", "context") if not isinstance(fields.get(name), str)]
    if absent:
        return f"no text as {absent[0]!r}, which every question of LongBench has"
    if not _texts(fields.get("answers")):
        return "no list of texts as 'answers', the true ones"
    if task.metric == "classification" and not _texts(fields.get("all_classes")):
        return f"no list of texts as 'all_classes', which {task.name} is scored by"
    if task.by_length and type(fields.get("length")) is not int:
        return f"no number as 'length', by which the scores of {task.name} are told apart"
    if task.metric == "retrieval" and not all(map(PARAGRAPH.search, fields["answers"])):
        return f"an answer that is no 'Paragraph 1', 'Paragraph 2', ..., as those of {task.name} are"
    return None


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _checked(folder: Path, data: TaskData) -> TaskData:
    """Refuse a prompt that asks for what rows do not have."""
    for row in data.rows:
        try:
            data.prompt_of(row)
        except (KeyError, IndexError, ValueError, AttributeError) as cause:
            has = ", ".join(f"{{{name}}}" for name in row.fields)
            expected = f"a prompt of {data.task.base} in {PROMPTS} that is made of {has}, and not {data.prompt[:60]!r}"
            raise OptionValueError("data", str(folder), expected) from cause
    return data

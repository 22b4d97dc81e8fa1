"""Evaluations that cannot start, cannot continue, or run out of memory."""

from __future__ import annotations

from collections.abc import Mapping

from kvquant.errors.base import KVQuantError
from kvquant.errors.config import ConfigError


class MalformedLineError(KVQuantError, ValueError):
    """A line of a JSONL file that is not what it should be.

    Attributes:
        path: the file.
        line: its number, from 1.
        problem: what is wrong with it.
    """

    def __init__(self, path: object, line: int, problem: str) -> None:
        self.path, self.line, self.problem = str(path), line, problem
        super().__init__(f"{self.path}, line {line}: {problem}.")


class JournalSettingsError(ConfigError):
    """A journal belongs to a run with other settings, whose results must not be mixed with those of this run.

    Attributes:
        path: the journal.
        differences: setting -> its value in the journal and its value now, None where there is none.
    """

    def __init__(self, path: object, differences: Mapping[str, tuple[object, object]]) -> None:
        self.path, self.differences = str(path), dict(differences)
        told = "; ".join(f"{name} was {_short(was)} and is {_short(now)}" for name, (was, now) in differences.items())
        super().__init__(
            f"{self.path} holds the results of a run with other settings: {told}. Run with the settings that it has, "
            "or give another file with --output."
        )


class OutOfMemoryError(KVQuantError, MemoryError):
    """Memory ran out in an evaluation; the library's own error is the `__cause__`.

    Attributes:
        part: what was being done.
        kept: how many finished parts the journal holds.
        path: the journal, empty where there is none.
        advice: what would need less memory.
    """

    def __init__(self, part: str, kept: int, path: str, advice: str) -> None:
        self.part, self.kept, self.path, self.advice = part, kept, path, advice
        if path:
            count = "1 finished part is" if kept == 1 else f"{kept} finished parts are"
            parts = f"{count} kept in {path}: the same command goes on there"
        else:
            parts = "With --output FILE.jsonl finished parts would be kept, and the same command would go on there"
        super().__init__(f"out of memory in {part}. {parts}. What needs less: {advice}.")


class ReportFileError(KVQuantError, ValueError):
    """A file that is not the JSON of a report.

    Attributes:
        path: the file.
        problem: what it is instead, or what is wrong with it.
    """

    def __init__(self, path: object, problem: str) -> None:
        self.path, self.problem = str(path), problem
        super().__init__(f"{self.path} is {self.problem}.")


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""A record of finished parts, so that an interrupted evaluation goes on where it stopped.

A journal is a JSONL file. Its first line holds the settings of the run: everything that its results depend on. Each
further line is one finished part, its key and its result. Results are handed out as JSON reads them back, in a run
that was interrupted and in one that was not, so both give the same to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from kvquant.errors import JournalSettingsError, MalformedLineError, OptionValueError, OutOfMemoryError
from kvquant.evaluation.failures import is_out_of_memory

#: Parts of a key, such as ``("reference:4", 1024, 7)``.
Key = tuple[str | int, ...]

_FORMAT = 1


class Journal:
    """Finished parts of one evaluation, in a file or, without one, in memory only.

    Use it as a context manager, or call `close`.

    Attributes:
        path: the file, None where there is none.
        settings: what the results depend on, as JSON reads it back.
    """

    def __init__(self, path: Path | str | None, settings: Mapping[str, Any]) -> None:
        """Open a journal: a new file is begun, one that exists is read and continued.

        A last line without an end was being written when the run was interrupted; it is dropped.

        Args:
            path: the file; None keeps nothing.
            settings: plain builtins. Whatever changes results belongs here: model, text, candidates, seed, versions.

        Raises:
            OptionValueError: the file cannot be read or written.
            MalformedLineError: a line is not what a journal has; nothing was changed.
            JournalSettingsError: the file belongs to a run with other settings.
        """
        self.path = None if path is None else Path(path)
        self.settings: dict[str, Any] = _through_json(settings)
        self._results: dict[Key, Any] = {}
        self._file: FileIO | None = None
        if self.path is not None:
            with _named(self.path):
                self._file = self._opened(self.path)

    def _opened(self, path: Path) -> FileIO:
        if path.exists() and not path.is_file():
            raise OptionValueError("output", str(path), "a file, and not a folder or a device")
        text = path.read_bytes() if path.exists() else b""
        header = _line({"kvquant_journal": _FORMAT, "settings": self.settings})
        whole = text[: text.rfind(b"\n") + 1]
        if not whole and header.startswith(text):
            path.write_bytes(b"")  # empty, or interrupted in its first line
        else:
            self._read(path, whole or text)
        file = path.open("r+b", buffering=0)
        file.truncate(len(whole))
        file.seek(len(whole))
        if not whole:
            _write(file, header)
        return file

    def _read(self, path: Path, text: bytes) -> None:
        for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), start=1):
            try:
                entry = json.loads(line)
            except ValueError as cause:
                raise MalformedLineError(path, number, f"not JSON, {_of_a_journal(number)}") from cause
            expected = {"kvquant_journal", "settings"} if number == 1 else {"key", "result"}
            if not isinstance(entry, dict) or not expected <= set(entry):
                names = " and ".join(sorted(expected))
                raise MalformedLineError(path, number, f"no object with {names}, {_of_a_journal(number)}")
            if number == 1:
                self._check_settings(path, entry)
            else:
                self._results[tuple(entry["key"])] = entry["result"]

    def _check_settings(self, path: Path, header: Mapping[str, Any]) -> None:
        if header["kvquant_journal"] != _FORMAT:
            raise MalformedLineError(
                path, 1, f"a journal of format {header['kvquant_journal']!r}; this version of kvquant has {_FORMAT}"
            )
        was, now = _flat(header["settings"]), _flat(self.settings)
        differences = {name: (was.get(name), now.get(name)) for name in [*was, *now] if was.get(name) != now.get(name)}
        if differences:
            raise JournalSettingsError(path, differences)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what is finished stays readable."""
        if self._file is not None:
            self._file.close()
            self._file = None

    # -------------------------------------------------------------------------------------------- parts

    def __len__(self) -> int:
        return len(self._results)

    def done(self, key: Key) -> bool:
        """Whether the part is finished."""
        return key in self._results

    def __getitem__(self, key: Key) -> Any:
        """Return the result of a finished part, as JSON reads it back."""
        return self._results[key]

    def add(self, key: Key, result: Any) -> Any:
        """Record a finished part; once this returns it survives a crash.

        Args:
            key: what it is called.
            result: plain builtins.

        Returns:
            The result as JSON reads it back.

        Raises:
            OptionValueError: the file cannot be written, because the disk is full or gone.
        """
        if self._file is not None and self.path is not None:
            with _named(self.path):
                _write(self._file, _line({"key": key, "result": result}))
        self._results[key] = _through_json(result)
        return self._results[key]

    def run(
        self,
        parts: Iterable[tuple[Key, Callable[[], Any]]],
        progress: Callable[[Key], object] = lambda _: None,
        *,
        advice: str = "shorter contexts or a smaller model",
    ) -> None:
        """Do the parts that are not finished, in order, and record each.

        Args:
            parts: keys, and what to call for their results.
            progress: called after each part, done now or before.
            advice: what would need less memory, for the message.

        Raises:
            OutOfMemoryError: memory ran out; finished parts are kept.
        """
        for key, work in parts:
            if not self.done(key):
                try:
                    result = work()
                except (MemoryError, RuntimeError) as cause:
                    if not is_out_of_memory(cause):
                        raise
                    where = " ".join(map(str, key))
                    raise OutOfMemoryError(where, len(self), str(self.path or ""), advice) from cause
                self.add(key, result)
            progress(key)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Raise what the system says of a file as an error that names the option."""
    try:
        yield
    except OSError as cause:
        expected = f"a file that can be read and written ({cause.strerror or cause})"
        raise OptionValueError("output", str(path), expected) from cause


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _write(file: FileIO, line: bytes) -> None:
    """Write a whole line to the disk, or nothing."""
    start = file.tell()
    try:
        while line:
            line = line[file.write(line) :]  # a full disk takes a part before it refuses
        os.fsync(file.fileno())
    except OSError:
        file.truncate(start)
        file.seek(start)
        raise


def _through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _of_a_journal(number: int) -> str:
    line = "the settings of a run" if number == 1 else "a finished part"
    return f"where a journal has {line}. Repair or delete it, or give another file with --output"


def _flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Return nested settings as ``{"model.dtype": ...}``."""
    if not isinstance(settings, dict):
        return {name: settings}
    return {
        inner: value
        for key, nested in settings.items()
        for inner, value in _flat(nested, f"{name}.{key}" if name else str(key)).items()
    }

"""What the commands measured, read back from the JSON that they print.

`read_report` makes of a file the report that the command had, so that whatever draws or shows a report can do so
again. Every field is checked on the way: a file that was cut off, edited, or printed by a version that says less is
an error which names the place.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvquant._version import __version__
from kvquant.errors import KVQuantError, MissingExtraError, ReportFileError
from kvquant.errors.base import did_you_mean
from kvquant.evaluation.attention import AttentionReport
from kvquant.evaluation.bench import BenchReport
from kvquant.evaluation.file_shapes import (
    AttentionFile,
    BenchFile,
    EvaluationFile,
    PlanFile,
    RateDistortionFile,
    TuneFile,
)
from kvquant.evaluation.longbench.report import LongBenchReport
from kvquant.evaluation.needle import NeedleReport
from kvquant.evaluation.perplexity import PerplexityReport
from kvquant.evaluation.plan import PlanReport
from kvquant.evaluation.rate_distortion import RateDistortionReport
from kvquant.evaluation.tuning.report import TuneReport

if TYPE_CHECKING:
    from cattrs import Converter

#: Any of them.
Report = (
    PerplexityReport
    | NeedleReport
    | LongBenchReport
    | AttentionReport
    | RateDistortionReport
    | BenchReport
    | PlanReport
    | TuneReport
)

#: Problems of a file that are told at most.
_TOLD = 3


@dataclass(frozen=True)
class Kind:
    """A kind of report.

    Attributes:
        command: what prints it, with ``--json``.
        report: the class that it is read back into.
        file: what else is read of its file; what reports keep as plain builtins is checked by it.
    """

    command: str
    report: type[Report]
    file: type = EvaluationFile


#: What a file's ``kind`` says -> what that is. A kind has a module of its name in `figures` and in `page.kinds` too.
KINDS: dict[str, Kind] = {
    "perplexity": Kind("kvquant eval perplexity", PerplexityReport),
    "needle": Kind("kvquant eval needle", NeedleReport),
    "longbench": Kind("kvquant eval longbench", LongBenchReport),
    "attention": Kind("kvquant eval attention", AttentionReport, AttentionFile),
    "rate_distortion": Kind("kvquant rate-distortion", RateDistortionReport, RateDistortionFile),
    "bench": Kind("kvquant bench", BenchReport, BenchFile),
    "plan": Kind("kvquant plan", PlanReport, PlanFile),
    "tune": Kind("kvquant tune", TuneReport, TuneFile),
}


@dataclass(frozen=True)
class ReportFile:
    """A file that was read.

    Attributes:
        name: of the file, without its folder.
        kind: one of `KINDS`.
        machine: what figures depend on, see `describe_machine`.
        model: what was measured, in words.
        report: what came out.
    """

    name: str
    kind: str
    machine: dict[str, Any]
    model: str
    report: Report

    @property
    def version(self) -> str:
        """The version of kvquant that printed it."""
        return str(self.machine["kvquant"])


def require_cattrs() -> None:
    """Raise before any work what reading would raise.

    Raises:
        MissingExtraError: cattrs is not installed.
    """
    try:
        importlib.import_module("cattrs")
    except ImportError as cause:
        raise MissingExtraError("cattrs", "pip install 'kvquant[eval]'") from cause


def read_report(path: Path) -> ReportFile:
    """Read what a command printed with ``--json``.

    Raises:
        ReportFileError: it cannot be read, or it is something else; the message says what.
        MissingExtraError: cattrs is not installed.
    """
    require_cattrs()
    content = _content(path)
    kind = KINDS[_kind(path, content)]
    problems: list[str] = []
    _structured(content, kind.file, problems)
    report = _structured(content, kind.report, problems)
    if not isinstance(content.get("results"), list) or not content["results"]:
        problems.append("results: expected a list with something in it")
    if problems:
        raise ReportFileError(path, _unfit(kind, list(dict.fromkeys(problems)), content))
    return ReportFile(path.name, content["kind"], content["machine"], _title(content["model"]), report)


def _title(model: str | Mapping[str, Any]) -> str:
    if isinstance(model, str):
        return model
    return f"{model['architecture']}, {model['name']}" if model["architecture"] else str(model["name"])


# ------------------------------------------------------------------------------------------------ what is no report


def _content(path: Path) -> dict[str, Any]:
    """Return the object in a file.

    Raises:
        ReportFileError: there is none; for what users are likely to give instead the message says what to do.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise ReportFileError(path, f"no text in UTF-8 that can be read ({cause})") from cause
    if not text.strip():
        raise ReportFileError(path, "empty; a command that fails or is interrupted prints no JSON")
    try:
        content = json.loads(text)
    except ValueError as cause:
        journal = _journal(text)
        if journal is not None:
            raise ReportFileError(path, _of_a_journal(path, journal)) from None
        raise ReportFileError(path, f"not JSON ({cause}); {_advice()}") from cause
    if not isinstance(content, dict):
        raise ReportFileError(path, f"JSON, and no report; {_advice()}")
    if "kvquant_journal" in content:
        raise ReportFileError(path, _of_a_journal(path, content))
    return content


def _journal(text: str) -> dict[str, Any] | None:
    """Return the first line of a journal, None if a text is none."""
    try:
        first = json.loads(text.partition("\n")[0])
    except ValueError:
        return None
    return first if isinstance(first, dict) and "kvquant_journal" in first else None


def _of_a_journal(path: Path, header: Mapping[str, Any]) -> str:
    settings = header.get("settings")
    name = str(settings.get("evaluation")) if isinstance(settings, dict) else ""
    command = KINDS[name].command if name in KINDS else "kvquant eval ..."
    return (
        "a journal of finished parts, which --output keeps. The command that wrote it makes JSON of it, with the same "
        f"options and --json, and measures nothing again: {command} ... --output {path.name} --json > {path.stem}.json"
    )


def _kind(path: Path, content: Mapping[str, Any]) -> str:
    kind = content.get("kind")
    if isinstance(kind, str) and kind in KINDS:
        return kind
    if kind is None:
        raise ReportFileError(path, f"JSON without a kind, and so no report; {_advice()}")
    known = ", ".join(f"{name} ({known.command})" for name, known in KINDS.items())
    says = f"a report of the kind {kind!r}, which there is not{_other_version(content)}."
    raise ReportFileError(path, f"{says}{did_you_mean(str(kind), KINDS)} Kinds are {known}")


def _advice() -> str:
    return f"reports are what these print with --json: {', '.join(kind.command for kind in KINDS.values())}"


def _unfit(kind: Kind, problems: list[str], content: Mapping[str, Any]) -> str:
    told = "; ".join(problems[:_TOLD])
    more = f"; and {len(problems) - _TOLD} more" if len(problems) > _TOLD else ""
    return f"not what {kind.command} --json prints{_other_version(content)}: {told}{more}"


def _other_version(content: Mapping[str, Any]) -> str:
    """Say which version of kvquant printed a file, if it was not this one."""
    machine = content.get("machine")
    version = machine.get("kvquant") if isinstance(machine, dict) else None
    return "" if version in (None, __version__) else f" in this version ({__version__}; it is from {version})"


# ------------------------------------------------------------------------------------------------ field by field


class _UnfitError(ValueError):
    """A value that is not of its field's type; its text is for people."""


def _structured(content: dict[str, Any], shape: Any, problems: list[str]) -> Any:
    """Return a file's content as something of the type `shape`; add what is wrong with it to `problems`."""
    from cattrs import BaseValidationError, transform_error

    try:
        return _converter().structure(content, shape)
    except BaseValidationError as error:
        for line in transform_error(error, path="", format_exception=_says):
            says, _, place = line.rpartition(" @ .")
            problems.append(f"{_place(place)}: {says}")
    return None


def _place(path: str) -> str:
    """Return a path such as ``rows[0].depths[1]`` in the file's own words."""
    return re.sub(r"\['([^']*)'\]", r".\1", re.sub(r"^rows\b", "results", path))


def _says(error: BaseException, type_: Any) -> str:
    if isinstance(error, KeyError):
        return "missing"
    if isinstance(error, (_UnfitError, KVQuantError)):
        return str(error).removesuffix(".")
    return f"expected {_NAMES.get(typing.get_origin(type_) or type_, 'an object')}, found something else"


#: What containers are called in JSON.
_NAMES: dict[Any, str] = {list: "a list", tuple: "a list"}


@functools.cache
def _converter() -> Converter:
    """Return what structures builtins; unlike cattrs' own, it makes no number of a text and no text of a number."""
    from cattrs import Converter

    converter = Converter()
    for type_, expected in _PLAIN.items():
        converter.register_structure_hook(type_, functools.partial(_plain, expected))
    converter.register_structure_hook_factory(dataclasses.is_dataclass, _object_hook)
    return converter


def _object_hook(type_: type, converter: Converter) -> Callable[[Any, Any], Any]:
    from cattrs.gen import make_dict_structure_fn, override

    # Reports have such a field; others have none, and that does no harm.
    structure: Callable[[Any, Any], Any] = make_dict_structure_fn(type_, converter, rows=override(rename="results"))

    def hook(value: Any, wanted: Any) -> Any:
        if not isinstance(value, dict):
            raise _UnfitError(f"expected an object, found {_short(value)}")
        return structure(value, wanted)

    return hook


#: Type -> what JSON may have there, and what that is called.
_PLAIN: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
}


def _plain(expected: tuple[tuple[type, ...], str], value: Any, type_: type) -> Any:
    types, words = expected
    if not isinstance(value, types) or (isinstance(value, bool) and type_ is not bool):
        raise _UnfitError(f"expected {words}, found {_short(value)}")
    return value  # a whole number that stands for a float stays one, so that it is written as it was


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

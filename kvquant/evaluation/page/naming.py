"""One name for one cache, and one section for one measurement, whatever files they come from.

Commands name caches in their own ways: what `kvquant bench` calls ``kvquant:reference:2`` and ``dynamic`` are
``reference:2`` and ``full`` elsewhere. And one label may stand for several caches, as options like ``--group-size`` are
no part of it. So a cache is known by its settings, which every report has, and where a label is not enough the
options that differ stand behind it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvquant.engine.config import CacheConfig
from kvquant.evaluation.bench import BenchReport
from kvquant.evaluation.candidates import FULL
from kvquant.evaluation.contenders import Contender
from kvquant.evaluation.rate_distortion import RateDistortionReport, RateDistortionRow
from kvquant.evaluation.reports import Report, ReportFile

#: A cache: what it is called, and its options in one order, those at kvquant's defaults left out.
Identity = tuple[str, str]


@dataclass(frozen=True)
class Measurement:
    """What one section shows: a report, of one file or of several that measured the same of other caches.

    Attributes:
        kind, model: as in `ReportFile`.
        report: its caches have the names of the page.
        files: where it comes from, with reports as they were read.
        apart: what tells it from others of its kind and model, the names of its files; empty where there are none.
    """

    kind: str
    model: str
    report: Report
    files: tuple[ReportFile, ...]
    apart: str = ""

    @property
    def subject(self) -> str:
        """What was measured, in words, told apart from others of its kind."""
        return f"{self.model} ({self.apart})" if self.apart else self.model


def measurements(files: Sequence[ReportFile]) -> list[Measurement]:
    """Name all caches, and put together what belongs together, in the order of the files."""
    names = _names([_identities(file.report) for file in files])
    together: dict[str, list[ReportFile]] = defaultdict(list)
    for number, file in enumerate(files):
        together[_comparable(file) or str(number)].append(file)
    subjects = Counter((same[0].kind, same[0].model) for same in together.values())
    found = []
    for same in together.values():
        kind, model = same[0].kind, same[0].model
        apart = ", ".join(file.name for file in same) if subjects[kind, model] > 1 else ""
        report = _merged([_renamed(file.report, names) for file in same])
        found.append(Measurement(kind, model, report, tuple(same), apart))
    return found


def _comparable(file: ReportFile) -> str:
    """Return what files have in common whose figures can stand in one table; empty for what stands alone.

    Times can only be compared with those of the same run.
    """
    if isinstance(file.report, BenchReport):
        return ""
    settings = {name: value for name, value in file.report.settings.items() if name != "caches"}
    return json.dumps([file.kind, file.model, settings], sort_keys=True)


def _merged(reports: Sequence[Any]) -> Any:
    """Return one report with the rows of all; where two have a row of one cache, the first one's."""
    first = reports[0]
    if len(reports) == 1:
        return first
    rows: dict[Any, Any] = {}
    for report in reports:
        for row in report.rows:
            rows.setdefault((_part(row), row.cache), row)
    parts = list(dict.fromkeys(part for part, _ in rows))
    caches = {label: settings for report in reports for label, settings in report.settings["caches"].items()}
    ordered = tuple(row for wanted in parts for (part, _), row in rows.items() if part == wanted)
    merged = dataclasses.replace(first, settings={**first.settings, "caches": caches}, rows=ordered)
    if isinstance(merged, RateDistortionReport):
        left_out = {name: why for report in reports for name, why in report.left_out.items()}
        return dataclasses.replace(merged, left_out=left_out)
    return merged


def _part(row: Any) -> Any:
    """Return what tells apart the rows of one cache: the context length, the task, or the states and the stream."""
    if isinstance(row, RateDistortionRow):
        return row.states, row.stream
    return getattr(row, "context", None) or getattr(row, "task", None)


# ------------------------------------------------------------------------------------------------ names


def _identities(report: Report) -> dict[str, Identity]:
    """Return each label of a report with what it stands for."""
    if isinstance(report, BenchReport):
        return {contender.label: _of_contender(contender) for contender in report.options.contenders}
    return {label: (label, _written(settings)) for label, settings in report.settings["caches"].items()}


def _of_contender(contender: Contender) -> Identity:
    if contender.kind == "dynamic":
        return FULL, _written({"kind": FULL})
    label = contender.label
    settings: dict[str, Any] = {"kind": contender.kind, "backend": contender.backend, "nbits": contender.nbits}
    settings |= contender.options
    if contender.kind == "kvquant":
        label = label.removeprefix("kvquant:")
        settings |= CacheConfig.from_dict(contender.options).to_dict() if contender.options else {}
    if contender.backend == "fp8":
        del settings["nbits"]  # it has but one width, which evaluations do not name
    return label, _written(settings)


def _written(settings: Mapping[str, Any]) -> str:
    defaults = CacheConfig().to_dict() if settings.get("kind") == "kvquant" else {}
    always = ("backend", "nbits")
    said = {name: value for name, value in settings.items() if name in always or value != defaults.get(name, ...)}
    return json.dumps(said, sort_keys=True)


def _names(reports: Iterable[Mapping[str, Identity]]) -> dict[Identity, str]:
    """Return a name for each cache: its label, with the options that differ where several have that label."""
    alike: dict[str, list[Identity]] = defaultdict(list)
    for identities in reports:
        for identity in identities.values():
            if identity not in alike[identity[0]]:
                alike[identity[0]].append(identity)
    return {
        identity: label if len(same) == 1 else _distinct(identity, same)
        for label, same in alike.items()
        for identity in same
    }


def _distinct(identity: Identity, same: Sequence[Identity]) -> str:
    settings = [json.loads(written) for _, written in same]
    differing = sorted(
        {name for one in settings for name in one if len({repr(each.get(name)) for each in settings}) > 1}
    )
    mine = json.loads(identity[1])
    said = ", ".join(f"{name}={mine[name]}" for name in differing if name in mine)
    return f"{identity[0]} ({said or 'as it is by default'})"


def _renamed(report: Report, names: Mapping[Identity, str]) -> Report:
    mine = {label: names[identity] for label, identity in _identities(report).items()}
    if isinstance(report, BenchReport):
        results = tuple(dataclasses.replace(row, cache=mine.get(row.cache, row.cache)) for row in report.results)
        return dataclasses.replace(report, results=results)
    rows: Any = tuple(dataclasses.replace(row, cache=mine.get(row.cache, row.cache)) for row in report.rows)
    caches = {mine[label]: settings for label, settings in report.settings["caches"].items()}
    renamed = dataclasses.replace(report, settings={**report.settings, "caches": caches}, rows=rows)
    if isinstance(renamed, RateDistortionReport):
        left_out = {mine.get(label, label): why for label, why in renamed.left_out.items()}
        return dataclasses.replace(renamed, left_out=left_out)
    return renamed

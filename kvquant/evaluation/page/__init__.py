"""One HTML page of all that was measured: self-contained, without scripts, and the same bytes for the same files."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kvquant._version import __version__
from kvquant.errors import MissingExtraError, OptionValueError
from kvquant.evaluation.figures import require_matplotlib
from kvquant.evaluation.outputs import check_writable
from kvquant.evaluation.page.commands import command_line
from kvquant.evaluation.page.naming import Measurement, measurements
from kvquant.evaluation.page.parts import Origin, Section, plural
from kvquant.evaluation.page.pictures import picture
from kvquant.evaluation.page.summary import summaries
from kvquant.evaluation.reports import KINDS, ReportFile, require_cattrs

if TYPE_CHECKING:
    from jinja2 import Template

TITLE = "What quantised caches lose and gain"

#: Versions of libraries that a machine's line names where it knows them.
_LIBRARIES = ("optimum-quanto", "hqq", "bitsandbytes", "turboquant", "numpy")


def require_libraries() -> None:
    """Raise before any work what making a page would raise.

    Raises:
        MissingExtraError: a library of the extra ``eval`` is not installed.
    """
    require_cattrs()
    require_matplotlib()
    if find_spec("jinja2") is None:
        raise MissingExtraError("jinja2", "pip install 'kvquant[eval]'")


def check_output(path: Path) -> None:
    """Refuse a page that could not be written when it is made.

    Raises:
        OptionValueError: it is no HTML file, or cannot be written.
    """
    check_writable("output", path, ".html", ".htm")


def make_page(files: Sequence[ReportFile], title: str = TITLE) -> str:
    """Return the page as HTML.

    Args:
        files: what to show, one at least; of one kind in this order.
        title: of the page.
    """
    kinds = list(KINDS)
    measured = measurements(sorted(files, key=lambda file: kinds.index(file.kind)))
    return _template().render(
        title=title,
        files=files,
        commands={name: kind.command for name, kind in KINDS.items()},
        machines=list(dict.fromkeys(map(_machine, files))),
        others=sorted({file.version for file in files} - {__version__}),
        version=__version__,
        summaries=summaries(measured, _kind),
        sections=[_section(one, number) for number, one in enumerate(measured, start=1)],
    )


def write_page(page: str, path: Path) -> None:
    """Write a page in one piece: until it is whole, an older one stays what it is.

    Raises:
        OptionValueError: it cannot be written.
    """
    path = path.resolve()  # a link stays one
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            partial.write_text(page, encoding="utf-8")
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    except OSError as cause:
        expected = f"a file that can be written ({cause.strerror or cause})"
        raise OptionValueError("output", str(path), expected) from cause


def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__name__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2")


def _kind(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.kinds.{name}")


def _section(one: Measurement, number: int) -> Section:
    shown, report = _kind(one.kind), one.report
    seen = shown.seen(report)
    figure = importlib.import_module(f"kvquant.evaluation.figures.{one.kind}")
    return Section(
        anchor=f"section-{number}",
        title=shown.TITLE,
        subtitle=one.subject,
        lead=shown.lead(report),
        pictures=(picture(lambda: figure.draw(report), seen),) if seen else (),
        tables=shown.tables(report),
        notes=shown.notes(report),
        origins=tuple(_origin(file, shown) for file in one.files),
    )


def _origin(file: ReportFile, shown: ModuleType) -> Origin:
    options = shown.options(file)
    report = file.report.to_dict()
    settings: Any = {name: value for name, value in report.items() if name not in ("kind", "results")}
    return Origin(
        file=file.name,
        command=command_line(KINDS[file.kind].command, options, file.name),
        machine=_machine(file, _LIBRARIES),
        settings=json.dumps({"machine": file.machine, **settings}, indent=2, ensure_ascii=False),
    )


def _machine(file: ReportFile, libraries: Sequence[str] = ()) -> str:
    """Return what figures depend on, in a line, with the versions of some libraries where they are known."""
    machine = file.machine
    cores = "" if machine["cores"] is None else f"{plural(machine['cores'], 'core')}, "
    known = [f"{name} {machine[name]}" for name in libraries if name in machine]
    versions = [f"{name} {machine[name]}" for name in ("kvquant", "torch", "transformers")]
    said = ", ".join([*versions, *known, f"Python {machine['python']}"])
    return f"{machine['cpu']}, {cores}{plural(machine['threads'], 'thread')}, on {machine['device']}; {said}"

"""`kvquant report` as it is typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from kvquant._version import __version__
from kvquant.evaluation.reports import KINDS
from tests.unit.evaluation import measured
from tests.unit.evaluation.measured import printed, saved

Command = Callable[..., Result]


def test_what_the_commands_print_is_put_on_a_page(kvquant: Command, tmp_path: Path) -> None:
    """For real: what was measured and planned a moment ago, joined."""
    cache = "reference:2:residual_length=32"
    small = ("--contexts", "128", "--windows", "2", "--backends", cache)
    commands = {
        "perplexity": ("eval", "perplexity", *small, "--outliers", "16"),
        "attention": ("eval", "attention", *small, "--queries", "4"),
        "rate": ("rate-distortion", "--tokens", "256", "--heads", "1", "--backends", cache, "--streams", "key"),
        "plan": ("plan", "--backend", "reference:2", "--residual-length", "32", "--context", "256"),
    }
    files = [saved(tmp_path, f"{name}.json", kvquant(*words, "--json").stdout) for name, words in commands.items()]
    output = tmp_path / "report.html"
    result = kvquant("report", *map(str, files), "--output", str(output), "--title", "My <caches>")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert f"Wrote {output}" in result.stderr
    page = output.read_text(encoding="utf-8")
    assert "<h1>My &lt;caches&gt;</h1>" in page
    for text in (
        "the outlier twin (factors up to 16) of the shipped model",
        "Attention&#39;s output",
        "Nearest to the bound is reference:2:residual_length=32 on",
        "reference:<wbr>2:<wbr>residual_length=32",
    ):
        assert text in page


def test_files_of_every_kind(kvquant: Command, tmp_path: Path) -> None:
    """In any order, and under the default title and name."""
    files = [saved(tmp_path, f"{kind}.json", printed(make())) for kind, make in reversed(measured.ALL.items())]
    result = kvquant("report", *map(str, files), "--output", str(tmp_path / "r.html"))
    assert result.exit_code == 0, result.output
    assert "<title>What quantised caches lose and gain</title>" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_help_says_how_to_make_the_files(kvquant: Command) -> None:
    """Every command whose JSON it takes."""
    text = kvquant("report", "--help").output
    for kind in KINDS.values():
        assert f"{kind.command} " in text
    assert "--json > perplexity.json" in text


def test_another_version_is_told(kvquant: Command, tmp_path: Path) -> None:
    """And is no error where everything is there."""
    path = saved(tmp_path, "a.json", printed(measured.plan(), kvquant="0.0.9"))
    result = kvquant("report", str(path), "--output", str(tmp_path / "r.html"))
    assert result.exit_code == 0, result.output
    assert f"a.json was measured by kvquant 0.0.9; this is kvquant {__version__}." in result.stderr


def test_a_file_that_is_no_report_leaves_the_old_page(kvquant: Command, tmp_path: Path) -> None:
    """The file and the place are named, without a traceback."""
    content = printed(measured.plan())
    del content["results"][1]["nbytes"]
    path, output = saved(tmp_path, "a.json", content), saved(tmp_path, "r.html", "old")
    result = kvquant("report", str(path), "--output", str(output))
    assert result.exit_code == 1
    assert f"{path} is not what kvquant plan --json prints: results[1].nbytes: missing." in result.stderr
    assert "Traceback" not in result.output
    assert output.read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument 'FILE.json"),
        (("nowhere.json",), "'nowhere.json' does not exist"),
        (("{file}", "--output", "{folder}/nowhere/r.html"), "expected a file in a folder that exists"),
        (("{file}", "--output", "{file}"), "expected a file name that ends in .html"),
        (("{file}", "{file}", "--output", "{folder}/r.html"), "expected each file once"),
    ],
)
def test_what_cannot_work_is_refused(
    arguments: tuple[str, ...], message: str, kvquant: Command, tmp_path: Path
) -> None:
    """As bad usage, before anything is read: the file is empty."""
    path = saved(tmp_path, "a.json", "")
    result = kvquant("report", *(one.format(file=path, folder=tmp_path) for one in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("library", ["cattrs", "matplotlib", "jinja2"])
def test_without_a_library_the_extra_is_named(
    library: str, kvquant: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a file is read."""
    path = saved(tmp_path, "a.json", json.dumps({}))
    monkeypatch.setitem(sys.modules, library, None)
    result = kvquant("report", str(path), "--output", str(tmp_path / "r.html"))
    assert result.exit_code == 1
    assert f"this needs {library}, which is not installed. Run: pip install 'kvquant[eval]'" in result.stderr

"""Reading reports back from the JSON that commands print."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kvquant._version import __version__
from kvquant.errors import MissingExtraError, ReportFileError
from kvquant.evaluation.journal import Journal
from kvquant.evaluation.reports import KINDS, read_report
from tests.unit.evaluation import measured
from tests.unit.evaluation.measured import printed, saved


def refused(path: Path) -> str:
    with pytest.raises(ReportFileError) as caught:
        read_report(path)
    assert caught.value.path == str(path)
    return str(caught.value)


@pytest.mark.parametrize("kind", measured.ALL)
def test_a_report_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    """Of the same class and equal, tuples and intervals too, with the machine and the model beside it."""
    report = measured.ALL[kind]()
    file = read_report(saved(tmp_path, "a.json", printed(report)))
    assert (file.name, file.kind, file.version) == ("a.json", kind, __version__)
    assert type(file.report) is KINDS[kind].report
    assert json.dumps(file.report.to_dict()) == json.dumps(report.to_dict())
    assert file.report == report
    assert file.machine == measured.MACHINE
    assert file.model == ("LlamaForCausalLM, random weights" if kind == "bench" else measured.MODEL)


def test_every_kind_has_a_picture_and_a_part_of_the_page() -> None:
    """A kind is one entry in a table, and modules of its name."""
    assert set(KINDS) == set(measured.ALL)
    for kind in KINDS:
        assert callable(importlib.import_module(f"kvquant.evaluation.figures.{kind}").draw)
        page = importlib.import_module(f"kvquant.evaluation.page.kinds.{kind}")
        assert page.TITLE
        for part in ("lead", "tables", "seen", "notes", "summary", "options"):
            assert callable(getattr(page, part))


def test_what_a_newer_version_says_more_is_left_alone(tmp_path: Path) -> None:
    """A field that this version does not know is no error."""
    content = printed(measured.perplexity(), kvquant="99.0")
    content["results"][0]["new"] = content["machine"]["new"] = 1
    assert read_report(saved(tmp_path, "a.json", content)).version == "99.0"


def without(place: str) -> Any:
    """Return what takes away the value at a place such as ``results.0.kl``."""

    def edit(content: Any) -> None:
        inner, last = at(content, place)
        del inner[last]

    return edit


def put(place: str, value: Any) -> Any:
    """Return what puts another value there."""

    def edit(content: Any) -> None:
        inner, last = at(content, place)
        inner[last] = value

    return edit


def at(content: Any, place: str) -> tuple[Any, Any]:
    *path, last = (int(step) if step.isdecimal() else step for step in place.split("."))
    for step in path:
        content = content[step]
    return content, last


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("perplexity", without("results.1.agreement"), "results[1].agreement: missing"),
        ("perplexity", without("settings"), "settings: missing"),
        ("perplexity", without("settings.caches"), "settings.caches: missing"),
        ("perplexity", without("machine"), "machine: missing"),
        ("perplexity", without("machine.torch"), "machine.torch: missing"),
        ("perplexity", without("model"), "model: missing"),
        ("perplexity", without("results"), "results: missing"),
        ("perplexity", put("results", []), "results: expected a list with something in it"),
        ("perplexity", put("results", {"a": 1}), "results: expected a list with something in it"),
        ("perplexity", put("results.5", 3), "results[5]: expected an object, found 3"),
        ("perplexity", put("results.0.kl.low", "x"), 'results[0].kl.low: expected a number, found "x"'),
        ("perplexity", put("results.0.tokens", 1.5), "results[0].tokens: expected a whole number, found 1.5"),
        ("perplexity", put("results.0.tokens", True), "results[0].tokens: expected a whole number, found true"),
        ("perplexity", put("results.0.cache", None), "results[0].cache: expected a text, found nothing"),
        ("needle", without("results.0.depths.1.kl"), "results[0].depths[1].kl: missing"),
        ("longbench", without("results.0.published.0.source"), "results[0].published[0].source: missing"),
        ("bench", put("results.2.step", {}), "results[2].step.median: missing"),
        ("bench", put("options.batch", 0), "options: batch=0 cannot work: expected at least 1"),
        ("bench", without("model.layers"), "model.layers: missing"),
        ("attention", without("settings.queries"), "settings.queries: missing"),
        (
            "attention",
            put("results.0.layers.1.output", "x"),
            'results[0].layers[1].output: expected a number, found "x"',
        ),
        ("rate_distortion", without("bounds"), "bounds: missing"),
        ("rate_distortion", put("settings.head_dim", 0.5), "settings.head_dim: expected a whole number, found 0.5"),
        (
            "tune",
            put("settings.budget", {"bits": 2, "memory": 9, "left": "x"}),
            "settings.budget.left: expected a number",
        ),
        ("plan", without("settings.weights.how"), "settings.weights.how: missing"),
        ("plan", put("results.0.curve", [[1, "a"]]), "results[0].curve[0][1]: expected a whole number"),
    ],
)
def test_a_field_that_is_missing_or_wrong_is_named(kind: str, edit: Any, message: str, tmp_path: Path) -> None:
    """With its place, and the command whose JSON it should be."""
    content = printed(measured.ALL[kind]())
    edit(content)
    said = refused(saved(tmp_path, "a.json", content))
    assert f"a.json is not what {KINDS[kind].command} --json prints: " in said
    assert message in said


def test_many_problems_are_counted(tmp_path: Path) -> None:
    """Three are told, which is enough to see what is wrong."""
    content = printed(measured.perplexity())
    for row in content["results"]:
        del row["kl"]
    said = refused(saved(tmp_path, "a.json", content))
    assert "results[0].kl: missing; results[1].kl: missing; results[2].kl: missing; and 3 more." in said


def test_a_file_of_another_version_that_does_not_fit_says_so(tmp_path: Path) -> None:
    """The version is the likeliest reason."""
    content = printed(measured.perplexity(), kvquant="0.0.1")
    del content["results"][0]["kl"]
    said = refused(saved(tmp_path, "a.json", content))
    assert f"in this version ({__version__}; it is from 0.0.1): results[0].kl: missing" in said


def test_a_journal_says_which_command_makes_json_of_it(tmp_path: Path) -> None:
    """A journal is what people have at hand; with one line it would be JSON by itself."""
    path = tmp_path / "run.jsonl"
    wanted = "kvquant eval needle ... --output run.jsonl --json > run.json"
    with Journal(path, {"evaluation": "needle"}) as journal:
        assert wanted in refused(path)
        journal.add(("a", 1), {})
        assert wanted in refused(path)
    assert "a journal of finished parts" in refused(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty; a command that fails or is interrupted prints no JSON"),
        ('{"kind": "perp', "not JSON (Unterminated string starting at: line 1 column 10 (char 9)); reports are what"),
        ("[1]", "JSON, and no report; reports are what these print with --json: kvquant eval perplexity, kvquant"),
        ('{"a": 1}', "JSON without a kind"),
        ('{"kind": "perplexitty"}', "Did you mean 'perplexity'? Kinds are perplexity (kvquant eval perplexity), "),
        ('{"kind": ["bench"]}', "a report of the kind ['bench'], which there is not"),
        ('{"kind": "new", "machine": {"kvquant": "9.9"}}', f"in this version ({__version__}; it is from 9.9)"),
    ],
)
def test_what_is_no_report_says_what_would_be(content: str, message: str, tmp_path: Path) -> None:
    """An empty file of a command that failed, half a file, other JSON."""
    assert message in refused(saved(tmp_path, "a.json", content))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """Such as a picture."""
    path = tmp_path / "a.json"
    path.write_bytes(b"\x89PNG\xff")
    assert "no text in UTF-8 that can be read" in refused(path)


def test_without_cattrs_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the file is looked at."""
    monkeypatch.setitem(sys.modules, "cattrs", None)
    with pytest.raises(MissingExtraError, match=r"needs cattrs.*pip install 'kvquant\[eval\]'"):
        read_report(tmp_path / "nowhere.json")

"""The page of all that was measured: what stands on it, under which names, and that nothing else is asked for."""

from __future__ import annotations

import base64
import dataclasses
import functools
import importlib
import itertools
import os
import re
import shlex
import stat
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import pytest
from click.testing import CliRunner

from kvquant.cli.main import cli
from kvquant.errors import OptionValueError
from kvquant.evaluation.page import check_output, make_page, write_page
from kvquant.evaluation.page.commands import command_line, evaluation_options
from kvquant.evaluation.page.kinds import perplexity
from kvquant.evaluation.page.naming import measurements
from kvquant.evaluation.page.parts import NOTHING, Cell, Column, Section, Table, estimate, number
from kvquant.evaluation.page.summary import best, bits_per_element, summaries
from kvquant.evaluation.reports import ReportFile, _title
from tests.unit.evaluation import measured

TWIN = f"the outlier twin (factors up to 64) of {measured.MODEL}"


def file(kind: str, report: Any = None, *, model: str = "", name: str = "", **machine: Any) -> ReportFile:
    report = measured.ALL[kind]() if report is None else report
    model = model or (_title(report.model) if kind == "bench" else measured.MODEL)
    return ReportFile(name or f"{kind}.json", kind, {**measured.MACHINE, **machine}, model, report)


@functools.cache
def page() -> str:
    return make_page([file(kind) for kind in measured.ALL])


class Page(HTMLParser):
    """Elements of a page with their attributes, rows of its tables as texts, and whether every element is closed."""

    VOID = ("meta", "img", "wbr", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data.strip()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# ------------------------------------------------------------------------------------------------ by itself


def test_nothing_is_asked_of_any_other_place() -> None:
    """No script, no link, no style or picture from elsewhere, neither on the page nor in its pictures."""
    parsed = Page(page())
    for tag, attributes in parsed.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data", "action"):
                assert (value or "").startswith(("data:image/svg+xml;base64,", "#"))
    assert not re.search(r"@import|url\(|https?://|javascript:", page())
    for picture in parsed.all("img"):
        drawn = base64.b64decode((picture["src"] or "").partition(",")[2]).decode()
        assert not re.search(r"<script|@import|url\((?!#)|href=\"(?!#|data:)", drawn)
    policy = [one["content"] for one in parsed.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_same_files_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user's settings of matplotlib are, and in whatever order kinds are named."""
    monkeypatch.setitem(mpl.rcParams, "axes.facecolor", "black")
    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    first, second = (make_page([file(kind) for kind in kinds]) for kinds in (("plan", "bench"), ("bench", "plan")))
    assert re.sub("<footer>.*", "", first, flags=re.DOTALL) == re.sub("<footer>.*", "", second, flags=re.DOTALL)
    assert [one["src"] for one in Page(first).all("img")] == [one["src"] for one in Page(page()).all("img")][-3:-1]
    assert mpl.rcParams["axes.facecolor"] == "black"


def test_a_name_is_text_whatever_it_is() -> None:
    """Neither elements of the page nor formulas of a picture are made of it."""
    name = "<script>alert(1)</script> $x_$ \"'&"
    report = measured.bench()
    report = dataclasses.replace(report, model={**report.model, "name": name, "architecture": None})
    text = make_page([file("perplexity", model=name), file("bench", report)], title=name)
    parsed = Page(text)
    assert not parsed.all("script")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $x_$ &#34;&#39;&amp;" in text
    assert "<title>&lt;script&gt;" in text


def test_it_can_be_read_aloud() -> None:
    """Language, alternative texts that say what is seen, headings of columns and rows, every anchor there."""
    parsed = Page(page())
    assert not parsed.open
    assert parsed.all("html") == [{"lang": "en"}]
    alts = [picture["alt"] or "" for picture in parsed.all("img")]
    assert len(alts) == 9
    assert all(len(alt) > 80 for alt in alts)
    assert any("reference:2 0.0025 nats at 2.50 bits" in alt for alt in alts)
    assert any("At 4k: full 64.0 MiB and 100 ms;" in alt for alt in alts)
    assert all(heading.get("scope") in ("col", "row", "colgroup") for heading in parsed.all("th"))
    anchors = {section["id"] for section in parsed.all("section")}
    assert {(link["href"] or "")[1:] for link in parsed.all("a")} == anchors


def test_all_kinds_are_shown_with_how_they_were_made() -> None:
    """A section for each, its settings folded, with the command and the versions."""
    parsed = Page(page())
    for title in (
        "Perplexity",
        "Needle in a haystack",
        "LongBench",
        "Attention&#39;s output",
        "Rate and distortion",
        "Memory and latency",
        "Plan",
        "Bits of each layer",
    ):
        assert f">{title}: <span" in page()
    assert len(parsed.all("details")) == 8
    assert all("open" not in one for one in parsed.all("details"))
    assert "kvquant eval perplexity --threads 1 --contexts 256,1024 --backends reference:4,reference:2 --json" in page()
    assert "transformers 5.23.0" in page()


# ------------------------------------------------------------------------------------------------ the summary


def part(kind: str) -> ModuleType:
    return importlib.import_module(f"kvquant.evaluation.page.kinds.{kind}")


def summed_up(*files: ReportFile) -> list[Section]:
    return summaries(measurements(files), part)


def test_the_summary_joins_what_commands_call_differently() -> None:
    """What bench calls kvquant:reference:2 and dynamic stands in the rows of reference:2 and full."""
    rows = Page(page()).rows
    start, end, *_ = (at for at, row in enumerate(rows) if row and row[0] == "cache")
    shown = {row[0].rstrip("\N{NO-BREAK SPACE}●"): row[1:] for row in rows[start + 1 : end]}
    tuned = ["tuned to 2.5 bits", "uniform 2"]
    assert list(shown) == ["full", "reference:4", "reference:2", *tuned, "transformers:fp8:8"]
    two = shown["reference:2"]
    assert two[0] == "2.50"
    assert two[1].startswith("2.5")  # 1/1000 nat
    assert two[4].startswith("75")  # keys found
    assert two[5].startswith("61.5")  # LongBench
    assert two[6].startswith("5")  # error of attention's output
    assert two[7] == two[8] == NOTHING.text  # of tune, which measured others
    assert two[9:13] == ["0.50"] * 4  # bits above Shannon's bound
    assert two[13] == "8.00"  # times smaller, of bench
    assert two[14].startswith("12.5")  # ms a step
    assert shown["full"][1] == shown["transformers:fp8:8"][1] == NOTHING.text


def test_rows_go_from_many_bits_to_few() -> None:
    """Full precision first, what has no bits per element last."""
    names = "kvquant:reference:2,static,kvquant:reference:8,dynamic"
    (found,) = summed_up(file("perplexity", measured.perplexity((2, 8, 4))), file("bench", measured.bench(names)))
    assert found.tables[0].caches == ("full", "reference:8", "reference:4", "reference:2", "static")


def test_a_plan_alone_is_a_summary_too() -> None:
    """And its widths stand in no summary where something was measured."""
    (alone,) = summed_up(file("plan"))
    (beside,) = summed_up(file("needle", measured.needle((4,))), file("plan"))
    assert alone.tables[0].caches == ("full", "reference:4", "reference:2")
    assert beside.tables[0].caches == ("full", "reference:4")


def test_each_model_has_a_summary() -> None:
    """A model and its outlier twin; what was measured of no such model stands in both, and says of which it is."""
    found = summed_up(file("perplexity"), file("perplexity", model=TWIN), file("bench"), file("plan"))
    assert [one.subtitle for one in found] == [measured.MODEL, TWIN]
    for one in found:
        headings = [group.heading for group in one.tables[0].groups]
        assert headings[1:] == [
            "Perplexity, 1k tokens, 3 windows",
            "Bench, 4k tokens, on cpu (LlamaForCausalLM, random weights)",
            "Plan, 1k tokens in bfloat16",
        ]


def test_the_best_for_their_bits() -> None:
    """No other has fewer bits and no larger KL divergence, or as few and a smaller one."""
    assert best(measured.perplexity((8, 4, 2))) == {"reference:8", "reference:4", "reference:2"}
    assert best(measured.perplexity((8, 4, 2), kl={8: 0.3, 4: 0.1, 2: 0.2})) == {"reference:4", "reference:2"}
    assert best(measured.perplexity((8, 4, 2), kl={8: 0.1, 4: 0.1, 2: 0.1})) == {"reference:2"}


def test_bits_are_those_of_the_longest_context() -> None:
    """With the first measurement that has any."""
    report = measured.perplexity((4,))
    rows = tuple(
        dataclasses.replace(row, bits_per_element=None if row.context == 256 else row.bits_per_element)
        for row in report.rows
    )
    assert bits_per_element(
        measurements([file("perplexity", dataclasses.replace(report, rows=rows)), file("plan")])
    ) == {
        "full": 32.0,
        "reference:4": 4.5,
        "reference:2": 3.0,
    }


def test_what_was_measured_of_synthetic_states_stands_beside_a_model_s_caches() -> None:
    """Caches that no model was measured with stand in no summary, unless there are no others."""
    (beside,) = summed_up(file("needle", measured.needle((4,))), file("rate_distortion"))
    (alone,) = summed_up(file("rate_distortion"))
    assert beside.tables[0].caches == ("full", "reference:4")
    assert set(alone.tables[0].caches) == {"reference:4", "reference:2"}
    assert [group.heading for group in alone.tables[0].groups] == [f"Shannon's bound ({measured.MODEL})"]  # no bits


# ------------------------------------------------------------------------------------------------ names


def test_one_label_with_other_options_is_another_cache() -> None:
    """What differs stands behind the label: --group-size is no part of it. Bench has the defaults."""
    coarse = measured.perplexity((2,), caches=measured.caches((2,), group_size=128))
    both = measurements([file("perplexity", measured.perplexity((2,))), file("perplexity", coarse), file("bench")])
    merged, timed = both
    plain, other = "reference:2 (as it is by default)", "reference:2 (group_size=128)"
    assert list(dict.fromkeys(row.cache for row in merged.report.rows)) == ["full", plain, other]
    assert plain in {row.cache for row in timed.report.results}


def test_a_default_said_or_not_is_the_same_cache() -> None:
    """Files of versions that know an option and of those that do not yet."""
    older = measured.caches((2,))
    del older["reference:2"]["check_finite"]
    files = [file("perplexity", measured.perplexity((2,), caches=one)) for one in (older, measured.caches((2,)))]
    (merged,) = measurements(files)
    assert [row.cache for row in merged.report.rows] == ["full", "reference:2"] * 2


def test_files_that_measured_the_same_are_put_together() -> None:
    """The rows of both, those of one cache once, each context together; both files are named."""
    files = [
        file("perplexity", measured.perplexity((4,)), name="a.json"),
        file("perplexity", measured.perplexity((2,)), name="b.json"),
    ]
    (merged,) = measurements(files)
    assert [(row.context, row.cache) for row in merged.report.rows] == list(
        itertools.product((256, 1024), ("full", "reference:4", "reference:2"))
    )
    assert list(merged.report.settings["caches"]) == ["full", "reference:4", "reference:2"]
    assert [one.name for one in merged.files] == ["a.json", "b.json"]


def test_rates_of_several_files_are_put_together() -> None:
    """Each stream of each kind of states once, and what was left out of either with its reason."""
    first, second = measured.rate_distortion((4,), quanto="not installed"), measured.rate_distortion((2,), hqq="broken")
    (merged,) = measurements(
        [file("rate_distortion", one, name=f"{at}.json") for at, one in enumerate((first, second))]
    )
    assert len(merged.report.rows) == 8
    assert {row.cache for row in merged.report.rows} == {"reference:4", "reference:2"}
    notes = part("rate_distortion").notes(merged.report)
    assert notes == ("quanto is left out: not installed.", "hqq is left out: broken.")
    assert "as values" in part("rate_distortion").seen(merged.report)


def test_a_cache_that_quantised_nothing_is_told() -> None:
    """It has an output, and no errors of keys and values."""
    report = measured.attention((4,))
    rows = [dataclasses.replace(row, bits_per_element=None, key=None, value=None) for row in report.rows]
    report = dataclasses.replace(report, rows=tuple(rows))
    assert part("attention").notes(report)[1] == "Nothing was quantised by reference:4."
    assert "error of keys, %" not in make_page([file("attention", report)])


@pytest.mark.parametrize("other", [{"model": TWIN}, {"report": measured.perplexity(seed=1)}])
def test_what_was_measured_otherwise_stays_apart(other: dict[str, Any]) -> None:
    """Of another model, or with other settings."""
    assert len(measurements([file("perplexity"), file("perplexity", **other)])) == 2


def test_times_of_two_runs_are_never_put_together() -> None:
    """Speed is compared within a run; the names of the files tell the two apart."""
    files = file("bench", name="one.json"), file("bench", name="two.json")
    subjects = [f"LlamaForCausalLM, random weights ({one.name})" for one in files]
    assert [one.subject for one in measurements(files)] == subjects
    (found,) = summed_up(*files)
    assert [group.heading for group in found.tables[0].groups] == [
        f"Bench, 4k tokens, on cpu ({one})" for one in subjects
    ]


# ------------------------------------------------------------------------------------------------ what is told


def test_another_version_is_told_on_the_page() -> None:
    """A warning above everything, and no warning without."""
    assert "measured by kvquant 0.0.9" in make_page([file("plan", kvquant="0.0.9")])
    assert "warning" not in re.sub(r"(?s)<style>.*</style>", "", page())


def test_caches_that_could_not_be_measured_are_told() -> None:
    """With the reason; the picture is drawn of the others, and there is none where there are none."""
    report = measured.bench()
    failed = [dataclasses.replace(one, amortised=None, problem="no such library") for one in report.results]
    half = dataclasses.replace(report, results=(*report.results[:2], *failed[2:]))
    assert "transformers:fp8:8 could not be measured: no such library" in part("bench").notes(half)
    assert part("bench").seen(half)
    none = dataclasses.replace(report, results=tuple(failed))
    assert not Page(make_page([file("bench", none)])).all("img")


def test_a_cache_that_has_quantised_nothing_has_no_point() -> None:
    """Nor is there a picture if none has."""
    report = measured.perplexity((4,))
    rows = tuple(dataclasses.replace(row, bits_per_element=None) for row in report.rows)
    text = make_page([file("perplexity", dataclasses.replace(report, rows=rows))])
    assert not Page(text).all("img")
    assert perplexity.seen(dataclasses.replace(report, rows=rows)) == ""


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (number(None), NOTHING),
        (number(-0.5, "{:+.1f}"), Cell("\N{MINUS SIGN}0.5")),
        (number(2.5, "{:.3g}", 1000), Cell("2,500")),
        (number(0.00001234, "{:.3g}"), Cell("1.23e-05")),
        (estimate(measured.around(10.0), "{:.1f}"), Cell("10.0", "9.0 to 11.0")),
        (estimate(None, "{}"), NOTHING),
    ],
)
def test_figures_as_people_write_them(cell: Cell, expected: Cell) -> None:
    """A minus sign, no powers of ten for what fits in figures."""
    assert cell == expected


def test_columns_without_a_figure_are_left_out() -> None:
    """So that a table is no wider than what was measured."""
    table = Table.of("", Column("a", {"x": Cell("1")}), Column("b", {"x": NOTHING, "y": NOTHING}), Column("c", {}))
    assert [column.heading for group in table.groups for column in group.columns] == ["a"]


# ------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("kind", measured.ALL)
def test_the_command_is_one_that_can_be_typed(kind: str) -> None:
    """Each option exists, and takes what is said."""
    shown = re.search(r"<code>(kvquant [^<]*) --json &gt; " + kind + r"\.json</code>", page())
    assert shown is not None
    words = shlex.split(shown[1].replace("&#39;", "'"))[1:]
    result = CliRunner().invoke(cli, [*words, "--help"])
    assert result.exit_code == 0, result.output
    for option in (word for word in words if word.startswith("--")):
        assert option.removeprefix("--no-") in result.output or option in result.output


def test_the_command_says_what_labels_do_not() -> None:
    """The twin's factor, and options for all caches; values with blanks are quoted."""
    report = measured.perplexity((2,), caches=measured.caches((2,), group_size=128))
    report.settings["model"]["outliers"] = 64
    options = evaluation_options(file("perplexity", report, model=TWIN.replace(measured.MODEL, "a model")))
    command = command_line("kvquant eval perplexity", options, "a b.json")
    assert command == (
        "kvquant eval perplexity --model 'a model' --outliers 64 --threads 1 --contexts 256,1024 "
        "--backends reference:2 --group-size 128 --json > 'a b.json'"
    )


# ------------------------------------------------------------------------------------------------ writing


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run leaves an old page as it is, and nothing beside it."""
    path = tmp_path / "report.html"
    write_page("old", path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_page("new", path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_page("new", path)
    assert path.read_text() == "new"


def test_a_page_has_the_rights_of_any_file(tmp_path: Path) -> None:
    """Those that the user's mask leaves, and a link stays one."""
    target, link = tmp_path / "target.html", tmp_path / "report.html"
    link.symlink_to(target)
    before = os.umask(0o022)
    try:
        write_page("new", link)
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


@pytest.mark.parametrize("name", ["report.json", "nowhere/report.html"])
def test_a_page_that_could_not_be_written_is_refused(name: str, tmp_path: Path) -> None:
    """Before anything is read."""
    with pytest.raises(OptionValueError, match="output"):
        check_output(tmp_path / name)

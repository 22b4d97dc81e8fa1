"""kvquant compare-backends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import kvquant as package
from kvquant.cli.compare_backends import HEADINGS
from kvquant.evaluation import distortion
from kvquant.plugin import BackendSpec, Capabilities, QuantizedRows
from kvquant.registry import get_backend
from tests.support import MinMax

Run = Callable[..., Result]
SMALL = ("--tokens", "128", "--heads", "1", "--rounds", "1")
PAGE = (Path(__file__).parents[3] / "docs" / "backends.md").read_text()
BUILT_IN = ("reference", "lloydmax", "trellis", "hqq", "quanto", "bitsandbytes")


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds mean nothing at these sizes."""
    monkeypatch.setattr(distortion, "_TURN", 1e-6)


def table_of(text: str) -> list[list[str]]:
    """Return the cells of the Markdown table whose first headings are ours."""
    lines = text[text.index("| " + HEADINGS[0] + " | " + HEADINGS[1]) :].splitlines()
    rows = [line for line in lines[: [*lines, ""].index("")] if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_a_table_of_methods(kvquant: Run) -> None:
    """With the machine, the versions, and what the figures mean, in 120 columns."""
    result = kvquant("compare-backends", "--backends", "reference:4,bitsandbytes:4:quant_type=fp4", *SMALL)
    assert result.exit_code == 0, result.output
    for text in ("torch 2", "bitsandbytes 0.", "bitsandbytes quant_type=fp4", "4.50", "(1.00)", "groups of 64"):
        assert text in result.stdout
    assert max(map(len, result.stdout.splitlines()[1:])) <= 120


def test_the_whole_table_fits(kvquant: Run) -> None:
    """A line for each backend, width and axis, the yardstick's first."""
    result = kvquant("compare-backends", *SMALL)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()[1:]
    assert max(map(len, lines)) <= 120
    rows = [line.split()[:3] for line in lines if " (" in line and "%" in line]
    assert rows[0] == ["reference", "1", "channel"]
    for name in BUILT_IN:
        can = get_backend(name).capabilities
        assert [row[1:] for row in rows if row[0] == name] == [
            [str(nbits), axis] for nbits in sorted(can.nbits) for axis in can.axes
        ]


def test_json(kvquant: Run) -> None:
    """Everything, for machines, and nothing else on standard output."""
    in_eight_bits = [name for name in BUILT_IN if 8 in get_backend(name).capabilities.nbits]
    names = ["--backends", ",".join(BUILT_IN), "--nbits", "8", "--axes", "token"]
    result = kvquant("compare-backends", *names, *SMALL, "--seed", "3", "--json")
    report = json.loads(result.stdout)
    assert [made["backend"] for made in report["results"]] == in_eight_bits
    assert {(made["nbits"], made["axis"]) for made in report["results"]} == {(8, "token")}
    assert report["results"][0]["gaussian"]["bits_per_element"] == 8.5
    assert report["results"][0]["quantise"]["count"] == 1
    assert set(report["libraries"]) == {"bitsandbytes", "hqq", "optimum-quanto"}
    assert report["options"]["seed"] == 3


@pytest.mark.parametrize("how", [(), ("--markdown",)])
def test_a_backend_that_cannot_be_used_is_named(kvquant: Run, monkeypatch: pytest.MonkeyPatch, how: tuple[str]) -> None:
    """Under the table, with the reason."""
    monkeypatch.setenv("KVQUANT_BLOCK_BACKENDS", "hqq,quanto,bitsandbytes")
    result = kvquant("compare-backends", "--nbits", "4", *SMALL, *how)
    assert result.exit_code == 0
    under = " ".join(result.stdout[result.stdout.index("Keys and values") :].split())
    assert "kvquant:hqq is left out: the environment's KVQUANT_BLOCK_BACKENDS" in under


def test_where_nothing_could_be_measured_the_exit_code_says_so(kvquant: Run) -> None:
    """With the reason in place of figures."""

    class Breaks(MinMax):
        def quantize(self, rows: object) -> QuantizedRows:
            raise RuntimeError("out of order")

    package.register(BackendSpec("breaks", Breaks, Capabilities(nbits=(4,))))
    try:
        result = kvquant("compare-backends", "--backends", "breaks", *SMALL)
    finally:
        package.unregister("breaks")
    assert result.exit_code == 1
    assert "breaks is left out: " in result.stdout
    assert "out of order" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--backends", "quanto:3"), 2, "nbits=3 is not supported; supported: 2, 4, 8"),
        (("--backends", "quanto", "--nbits", "3"), 2, "nbits=3 cannot work: expected one or more of 2, 4, 8"),
        (("--nbits", "two"), 2, "nbits='two' cannot work"),
        (("--nbits", "5"), 2, "nbits=5 cannot work: expected one or more of 1, 2, 3, 4, 8"),
        (("--axes", "row"), 2, "axes='row' cannot work: expected one or more of channel, token"),
        (("--tokens", "100"), 2, "tokens=100 cannot work: expected a multiple of 64"),
        (("--device", "nonsense"), 2, "device='nonsense' cannot work"),
        (("--backends", "hqq:4:optimize=["), 1, "optimize='[' is not supported; supported: True, False"),
        (("--backends", "refrence"), 1, "Did you mean 'reference'"),
    ],
)
def test_what_cannot_work_is_refused(kvquant: Run, arguments: tuple[str, ...], code: int, says: str) -> None:
    """With a message and an exit code, and no table."""
    result = kvquant("compare-backends", *arguments)
    assert result.exit_code == code
    assert says in result.stderr
    assert result.stdout == ""


def test_the_page_shows_what_the_command_prints(kvquant: Run) -> None:
    """The same columns, and a row for every built-in backend, width and axis; figures are a machine's own."""
    printed = table_of(kvquant("compare-backends", "--markdown", *SMALL).stdout)
    documented = table_of(PAGE)
    assert documented[0] == printed[0] == list(HEADINGS)
    assert {len(row) for row in documented} == {len(HEADINGS)}
    assert [row[:3] for row in documented[2:]] == [row[:3] for row in printed[2:] if row[0] in BUILT_IN]
    for name in BUILT_IN:
        can = get_backend(name).capabilities
        assert sum(row[0] == name for row in documented) == len(can.nbits) * len(can.axes)


def test_the_page_shows_the_errors_of_today() -> None:
    """They depend on seed and backend alone, so a page that was left behind shows: here on a few lines that are quick.

    Up to what another processor's rounding may change.
    """
    from kvquant.evaluation.distortion import DistortionOptions, measure_distortion
    from kvquant.evaluation.methods import find_methods

    methods, _ = find_methods("reference:2,hqq:4:token,quanto:8:token,bitsandbytes:4:token")
    report = measure_distortion(DistortionOptions(methods=methods, rounds=1), {}, lambda _: None)
    documented = {tuple(row[:3]): row for row in table_of(PAGE)}
    for made in report.results:
        row = documented[made.backend, str(made.nbits), made.axis]
        assert float(row[3]) == pytest.approx(made.gaussian.bits_per_element, abs=0.006)
        for cell, quality in zip(row[4:6], (made.gaussian, made.outliers), strict=True):
            assert float(cell.removesuffix("%")) == pytest.approx(100 * quality.error, rel=0.02)

"""kvquant compare-backends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from kvquant.cli.compare_backends import HEADINGS
from kvquant.registry import get_backend

Run = Callable[..., Result]
SMALL = ("--tokens", "128", "--heads", "1", "--rounds", "1")
PAGE = (Path(__file__).parents[3] / "docs" / "backends.md").read_text()


def table_of(text: str) -> list[list[str]]:
    """Return the cells of the Markdown table whose first heading is ours."""
    lines = text[text.index("| " + HEADINGS[0] + " | " + HEADINGS[1]) :].splitlines()
    rows = [line for line in lines[: [*lines, ""].index("")] if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_a_table_of_methods(kvquant: Run) -> None:
    """With the machine, the versions, and what the figures mean."""
    result = kvquant("compare-backends", "--backends", "reference:4,bitsandbytes:4:quant_type=fp4", *SMALL)
    assert result.exit_code == 0, result.output
    for text in ("torch 2", "bitsandbytes 0.", "bitsandbytes quant_type=fp4", "4.50", "(1.00)", "groups of 64"):
        assert text in result.stdout
    assert max(map(len, result.stdout.splitlines()[1:])) <= 120


def test_json(kvquant: Run) -> None:
    """Everything, for machines."""
    names = "reference,bitsandbytes,hqq,quanto"
    result = kvquant("compare-backends", "--backends", names, "--nbits", "8", "--axes", "token", *SMALL, "--json")
    report = json.loads(result.stdout)
    assert ",".join(made["backend"] for made in report["results"]) == names
    assert {made["axis"] for made in report["results"]} == {"token"}
    assert report["results"][0]["quantise"]["count"] == 1
    assert set(report["libraries"]) == {"bitsandbytes", "hqq", "optimum-quanto"}


def test_a_backend_that_cannot_be_used_is_named(kvquant: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the table, with the reason."""
    monkeypatch.setenv("KVQUANT_BLOCK_BACKENDS", "hqq,quanto,bitsandbytes")
    result = kvquant("compare-backends", "--nbits", "4", *SMALL)
    assert "kvquant:hqq is left out: the environment's KVQUANT_BLOCK_BACKENDS" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--backends", "quanto:3"), 2, "nbits=3 is not supported; supported: 2, 4, 8"),
        (("--nbits", "two"), 2, "nbits='two' cannot work"),
        (("--nbits", "5"), 2, "nbits=[5] cannot work: expected widths that one of the backends has"),
        (("--axes", "row"), 2, "axes='row' cannot work: expected one or more of channel, token"),
        (("--tokens", "100"), 2, "tokens=100 cannot work: expected a multiple of the group size, 64"),
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
    built_in = {"reference", "hqq", "quanto", "bitsandbytes"}
    assert [row[:3] for row in documented[2:]] == [row[:3] for row in printed[2:] if row[0] in built_in]
    for name in built_in:
        can = get_backend(name).capabilities
        assert sum(row[0] == name for row in documented) == len(can.nbits) * len(can.axes)

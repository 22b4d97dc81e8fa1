"""`kvquant eval attention` as it is typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.unit.cli.interrupted import goes_on

Command = Callable[..., Result]
SMALL = ("eval", "attention", "--contexts", "160", "--queries", "4", "--windows", "2", "--residual-length", "32")


def test_totals_and_layers(kvquant: Command) -> None:
    """With the machine and the model, in 120 columns."""
    result = kvquant(*SMALL, "--backends", "reference:4:2,lloydmax:2:rotation_key=hadamard", "--contexts", "128,160")
    assert result.exit_code == 0, result.output
    for text in ("torch 2", "the shipped model", "160 tokens, the last 4 of them decoded", "Layer by layer", "95 %"):
        assert text in result.stdout
    assert max(map(len, result.stdout.splitlines()[1:])) <= 120
    assert result.stdout.count("reference:4") == 4


def test_a_run_that_goes_on_where_it_stopped(kvquant: Command, tmp_path: Path) -> None:
    """JSON and a picture from what was kept, of the outlier twin, and nothing beside them on standard output."""
    output, picture = tmp_path / "run.jsonl", tmp_path / "layers.png"
    command = (*SMALL, "--backends", "reference:2", "--outliers", "64", "--json", "--output", str(output))
    report = goes_on(lambda: kvquant(*command, "--plot", str(picture)), output, finished=1)
    assert report["kind"] == "attention"
    assert report["model"] == "the outlier twin (factors up to 64) of the shipped model"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_cache_that_quantises_nothing_is_told(kvquant: Command) -> None:
    """With what would help; the others are measured all the same."""
    result = kvquant(*SMALL, "--backends", "reference:4,reference:2:residual_length=512", "--windows", "1")
    assert result.exit_code == 0, result.output
    said = "reference:2:residual_length=512 has quantised none of 160 tokens: longer --contexts, or a shorter window."
    assert said in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--contexts 4096", "contexts=4096 cannot work: expected at most 2048 tokens"),
        ("--queries 0", "queries=0 cannot work"),
        ("--backends hqqq:2", "unknown backend 'hqqq'. Did you mean 'hqq'?"),
        ("--plot nowhere/x.png", "plot='nowhere/x.png' cannot work: expected a file in a folder that exists"),
    ],
)
def test_what_cannot_work_is_refused(options: str, message: str, kvquant: Command) -> None:
    """With the option and what would work, without a traceback."""
    result = kvquant(*SMALL, *options.split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""

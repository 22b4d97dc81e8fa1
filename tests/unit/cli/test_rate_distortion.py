"""`kvquant rate-distortion` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.unit.cli.interrupted import goes_on

Command = Callable[..., Result]
SMALL = ("rate-distortion", "--tokens", "256", "--heads", "1", "--residual-length", "0")


def test_a_table_for_each_kind_of_states(kvquant: Command) -> None:
    """With the machine, the rate, the bound and what the figures mean, in 120 columns."""
    result = kvquant(*SMALL, "--backends", "lloydmax,reference:2:scale=error:rotation_value=hadamard")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    for text in ("torch 2", "unit Gaussian states", "states with outlier channels", "SNR,", "bound"):
        assert text in result.stdout
    assert max(map(len, lines[1:])) <= 120
    found = [line.split() for line in lines if line.strip().startswith("lloydmax:2")]
    assert [row[1:4] for row in found] == 2 * [["keys,", "channel", "2.26"], ["values,", "token", "2.26"]]
    assert sum("lloydmax:" in line for line in lines) == 4 * 4


def test_json_and_a_picture(kvquant: Command, tmp_path: Path) -> None:
    """Everything for machines, and nothing beside it; the same numbers from what was kept."""
    more = ("--backends", "reference:4:2,lloydmax:2", "--states", "gaussian", "--streams", "value", "--json")
    output, picture = tmp_path / "run.jsonl", tmp_path / "bound.png"
    first, second = (
        kvquant(*SMALL, *more, "--output", str(output), "--plot", str(picture), "--seed", "3") for _ in range(2)
    )
    assert first.exit_code == 0, first.output
    report = json.loads(first.stdout)
    assert report["kind"] == "rate_distortion"
    assert [row["cache"] for row in report["results"]] == ["reference:4", "reference:2", "lloydmax:2"]
    assert {row["stream"] for row in report["results"]} == {"value"}
    assert report["settings"]["caches"]["reference:2"]["nbits"] == 2
    assert json.loads(second.stdout)["results"] == report["results"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(output.read_text().splitlines()) == 4


def test_a_run_that_goes_on_where_it_stopped(kvquant: Command, tmp_path: Path) -> None:
    """With the problem of a cache that quantises nothing, too."""
    output = tmp_path / "run.jsonl"
    caches = "reference:2,reference:4:residual_length=400,hqq:4"
    command = (*SMALL, "--backends", caches, "--states", "gaussian", "--json", "--output", str(output))
    report = goes_on(lambda: kvquant(*command), output, finished=1)
    assert list(report["left_out"]) == ["reference:4:residual_length=400"]


def test_without_names_every_backend_is_measured(kvquant: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that cannot be used are named with their reason."""
    monkeypatch.setenv("KVQUANT_BLOCK_BACKENDS", "hqq,quanto")
    result = kvquant(*SMALL, "--states", "gaussian", "--streams", "key")
    assert result.exit_code == 0, result.output
    for text in ("reference:8", "lloydmax:1", "bitsandbytes:4", "kvquant:hqq is left out: the environment's"):
        assert text in result.stdout
    assert "hqq:2" not in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--backends hqqq:2", "unknown backend 'hqqq'. Did you mean 'hqq'?"),
        ("--backends reference:5", "nbits=5"),
        ("--states normal", "states='normal' cannot work"),
        ("--streams query", "streams='query' cannot work"),
        ("--tokens 0", "tokens=0 cannot work"),
        ("--plot nowhere/x.png", "plot='nowhere/x.png' cannot work: expected a file in a folder that exists"),
        ("--device warp", "device='warp'"),
    ],
)
def test_what_cannot_work_is_refused(options: str, message: str, kvquant: Command) -> None:
    """With the option and what would work, without a traceback."""
    result = kvquant(*SMALL, *options.split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""

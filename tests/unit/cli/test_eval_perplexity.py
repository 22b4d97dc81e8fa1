"""`kvquant eval perplexity` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvquant.cli.main import cli
from kvquant.demo import MODEL_DIR
from tests.unit.cli.interrupted import goes_on

SMALL = "eval perplexity --contexts 256 --windows 2 --backends reference:4:2:residual_length=32"


def run(*more: str) -> Result:
    return CliRunner().invoke(cli, [*SMALL.split(), *more])


def test_a_table_for_each_context_and_what_its_figures_mean() -> None:
    """With the machine and the model."""
    result = run("--contexts", "128,256")
    assert result.exit_code == 0, result.output
    for text in ("torch 2", "the shipped model", "128 tokens", "256 tokens", "reference:4", "reference:2", "95 %"):
        assert text in result.stdout


def test_json_has_everything_and_nothing_beside_it() -> None:
    """KL divergence and agreement beside perplexity, each with its interval; the same numbers each time."""
    first, second = (json.loads(run("--json", "--model", str(MODEL_DIR)).stdout) for _ in range(2))
    assert first["kind"] == "perplexity"
    assert first["results"] == second["results"]
    two = first["results"][2]
    assert two["cache"] == "reference:2:residual_length=32"
    for figure in ("perplexity", "difference", "change", "kl", "agreement"):
        assert two[figure]["low"] <= two[figure]["value"] <= two[figure]["high"]
    assert len(two["windows"]) == 2


def test_a_run_that_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The file of an interrupted run, its last line torn off, gives what the whole run gave."""
    output = tmp_path / "run.jsonl"
    goes_on(lambda: run("--json", "--output", str(output)), output, finished=2)


def test_a_picture(tmp_path: Path) -> None:
    """Where it was asked for; standard output does not mention it."""
    picture = tmp_path / "kl.png"
    result = run("--json", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    json.loads(result.stdout)
    assert f"Wrote {picture}" in result.stderr


def test_the_outlier_twin_is_said_to_be_one() -> None:
    """In the table, and its full precision is the model's."""
    result = run("--outliers", "64", "--json")
    twin, plain = json.loads(result.stdout), json.loads(run("--json").stdout)
    assert twin["model"] == "the outlier twin (factors up to 64) of the shipped model"
    assert twin["settings"]["model"]["outliers"] == 64
    assert twin["results"][0]["perplexity"] == plain["results"][0]["perplexity"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--contexts 4096", "contexts=4096 cannot work: expected at most 2048 tokens"),
        ("--backends hqqq:2", "unknown backend 'hqqq'. Did you mean 'hqq'?"),
        ("--backends reference:5", "nbits=5"),
        ("--outliers 50", "outliers=50 cannot work: expected a power of two"),
        ("--device warp", "device='warp'"),
        ("--text nowhere.txt", "nowhere.txt' does not exist"),
        ("--plot nowhere/kl.png", "nowhere"),
        ("--windows 0", "windows=0 cannot work"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(options: str, message: str) -> None:
    """Without a traceback, with the exit code of bad usage."""
    result = run(*options.split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_text_that_is_no_text(tmp_path: Path) -> None:
    """Bytes that are not UTF-8."""
    path = tmp_path / "text.bin"
    path.write_bytes(b"\xff\xfe\x00")
    result = run("--text", str(path))
    assert result.exit_code == 2
    assert f"text='{path}' cannot work: expected a text in UTF-8" in result.stderr


def test_settings_that_changed_are_refused(tmp_path: Path) -> None:
    """Results of other settings must not be mixed; the file stays as it was."""
    output = tmp_path / "run.jsonl"
    run("--output", str(output))
    before = output.read_bytes()
    result = run("--output", str(output), "--contexts", "128")
    assert result.exit_code == 2
    assert "contexts was [256] and is [128]" in result.stderr
    assert output.read_bytes() == before

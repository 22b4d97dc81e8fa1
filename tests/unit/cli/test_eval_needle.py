"""`kvquant eval needle` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvquant.cli.main import cli
from kvquant.demo import MODEL_DIR
from tests.unit.cli.interrupted import goes_on

SMALL = "eval needle --contexts 160 --depths 0,60 --trials 1 --backends reference:4:2:residual_length=32"


def run(*more: str) -> Result:
    return CliRunner().invoke(cli, [*SMALL.split(), *more])


def test_a_table_for_each_context_a_grid_and_what_its_figures_mean() -> None:
    """With the machine and the model."""
    result = run("--contexts", "128,160")
    assert result.exit_code == 0, result.output
    for text in (
        "torch 2",
        "the shipped model",
        "128 tokens, 2 depths, 1 key of 5 digits at each",
        "160 tokens",
        "reference:4",
        "Keys retrieved, %, by depth",
        "Wilson",
        "Fewer than 10 questions at 128, 160",
    ):
        assert text in result.stdout
    grid = result.stdout[result.stdout.index("by depth") :]
    assert ["full", "128", "100", "100"] in [line.split() for line in grid.splitlines()]


def test_json_has_everything_and_nothing_beside_it() -> None:
    """The grid and every question; the same numbers each time."""
    first, second = (json.loads(run("--json", "--model", str(MODEL_DIR)).stdout) for _ in range(2))
    assert first["kind"] == "needle"
    assert first["results"] == second["results"]
    two = first["results"][2]
    assert two["cache"] == "reference:2:residual_length=32"
    for figure in ("retrieved", "digits", "nll", "kl", "agreement"):
        assert two[figure]["low"] <= two[figure]["value"] <= two[figure]["high"]
    assert [cell["depth"] for cell in two["depths"]] == [0, 60]
    assert [len(trial["key"]) for trial in two["trials"]] == [5, 5]


def test_a_run_that_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The file of an interrupted run, its last line torn off, gives what the whole run gave."""
    output = tmp_path / "run.jsonl"
    goes_on(lambda: run("--json", "--output", str(output)), output, finished=2)


def test_a_picture(tmp_path: Path) -> None:
    """Where it was asked for; standard output does not mention it."""
    picture = tmp_path / "needle.png"
    result = run("--json", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    json.loads(result.stdout)
    assert f"Wrote {picture}" in result.stderr


def test_sentences_and_text_of_ones_own(tmp_path: Path) -> None:
    """Recorded with the result; a model that does not know the answer in full precision says little about caches."""
    text = tmp_path / "text.txt"
    text.write_text("Grass is green, the sky is blue, and the sun is yellow. " * 40, encoding="utf-8")
    own = ("--text", str(text), "--needle", "{key} sheep.", "--question", "Trains leave at", "--digits", "3")
    result = run(*own, "--distractors", "2", "--json")
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)["settings"]
    assert (settings["needle"], settings["question"]) == ("{key} sheep.", "Trains leave at")
    assert (settings["digits"], settings["distractors"]) == (3, 2)
    assert "With full precision the model itself misses most keys at 160" in run(*own).stdout


def test_the_outlier_twin_and_the_prefilled_question_are_said() -> None:
    """In the table."""
    result = run("--outliers", "64", "--prefill-question")
    assert result.exit_code == 0, result.output
    assert "the outlier twin (factors up to 64) of the shipped model" in result.stdout
    assert "The question was in the prefill" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--contexts 4096", "contexts=4096 cannot work: expected at most 2048 tokens"),
        ("--contexts 20", "contexts=20 cannot work: expected at least 37 tokens, which the sentences and a key take"),
        ("--depths 0,101", "depths='0,101' cannot work: expected whole per cents from 0 to 100"),
        ("--depths 5,5", "each once"),
        ("--depths -3", "depths='-3'"),
        ("--trials 0", "trials=0 cannot work: expected at least 1"),
        ("--digits 0", "digits=0 cannot work: expected at least 1"),
        ("--distractors 99", "distractors=99 cannot work: expected 0 to 30"),
        ("--needle hay", "needle='hay' cannot work: expected a sentence with {key} in it, once"),
        ("--backends hqqq:2", "unknown backend 'hqqq'. Did you mean 'hqq'?"),
        ("--text nowhere.txt", "nowhere.txt' does not exist"),
        ("--plot nowhere/needle.png", "nowhere"),
        ("--seed -1", "'--seed': -1 is not in the range x>=0"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(options: str, message: str) -> None:
    """Without a traceback, with the exit code of bad usage."""
    result = run(*options.split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_text_that_is_too_short(tmp_path: Path) -> None:
    """For the context, which says how much is missing."""
    text = tmp_path / "text.txt"
    text.write_text("Grass is green.", encoding="utf-8")
    result = run("--text", str(text))
    assert result.exit_code == 2
    assert "tokens' cannot work: expected at least 124 tokens for a context of 160" in result.stderr


def test_settings_that_changed_are_refused(tmp_path: Path) -> None:
    """Results of other settings must not be mixed; the file stays as it was."""
    output = tmp_path / "run.jsonl"
    run("--output", str(output))
    before = output.read_bytes()
    result = run("--output", str(output), "--trials", "2")
    assert result.exit_code == 2
    assert "trials was 1 and is 2" in result.stderr
    assert output.read_bytes() == before

"""`kvquant eval longbench` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvquant.cli.main import cli
from kvquant.demo import LONGBENCH_DIR, MODEL_DIR
from tests.unit.cli.interrupted import goes_on

SMALL = "eval longbench --limit 1 --max-length 150 --backends reference:2:residual_length=32"
#: Two of the sample's tasks; their prompts lose so much of their middle that little is left to compute.
TASKS = ("--sample", "--tasks", "trec,samsum")
ONE_TASK = ("--sample", "--tasks", "trec")


def run(*more: str) -> Result:
    return CliRunner().invoke(cli, [*SMALL.split(), *more])


def folder(path: Path, **tasks: int) -> Path:
    """Write a folder of the benchmark's with some questions of the sample, and short prompts and answers for them."""
    for task, count in tasks.items():
        lines = (LONGBENCH_DIR / "data" / "hotpotqa.jsonl").read_text("utf-8").splitlines(keepends=True)
        (path / f"{task}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    bases = [task.removesuffix("_e") for task in tasks]
    (path / "dataset2prompt.json").write_text(json.dumps(dict.fromkeys(bases, "{context}\n{input}")))
    (path / "dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(bases, 3)))
    return path


def test_tables_of_scores_and_divergences_and_what_they_mean() -> None:
    """Tasks from top to bottom, caches side by side; with the machine and the model."""
    result = run(*TASKS)
    assert result.exit_code == 0, result.output
    for text in (
        "torch 2",
        "the shipped model",
        "Score, 0 to 100",
        "KL divergence to full precision, 1/1000 nat",
        "mean of the tasks",
        "Over all tasks, the mean of their figures",
        "reference:2",
        "95 % confidence intervals, from questions drawn again within their task",
        "Fewer than 10 questions of trec, samsum",
        "lost their middle: 1 of 1 of trec, 1 of 1 of samsum",
        "its scores say nothing about LongBench",
    ):
        assert text in result.stdout
    assert "Published" not in result.stdout
    assert ["trec", "accuracy", "1"] in [line.split()[:3] for line in result.stdout.splitlines()]


def test_json_has_everything_and_nothing_beside_it() -> None:
    """Answers and settings too; the same numbers each time."""
    first, second = (json.loads(run(*ONE_TASK, "--json", "--model", str(MODEL_DIR)).stdout) for _ in range(2))
    assert first["kind"] == "longbench"
    assert {"machine", "model", "kind", "settings", "results"} == set(first)
    assert first["results"] == second["results"]
    assert [(row["cache"], row["task"]) for row in first["results"][:2]] == [
        ("full", "trec"),
        ("reference:2:residual_length=32", "trec"),
    ]
    assert first["results"][1]["kl"]["value"] > 0
    assert first["results"][1]["answers"][0]["id"] == "sample-trec-0"
    assert set(first["settings"]["tasks"]) == {"trec"}
    assert first["settings"]["max_length"] == 150


def test_a_run_that_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The file of an interrupted run, its last line torn off, gives what the whole run gave, and holds the answers."""
    output = tmp_path / "run.jsonl"
    report = goes_on(lambda: run(*ONE_TASK, "--json", "--output", str(output)), output, finished=1)
    answer = json.loads(output.read_bytes().splitlines()[1])["result"]["answer"]
    assert answer == report["results"][0]["answers"][0]["answer"]
    changed = run(*ONE_TASK, "--output", str(output), "--max-length", "140")
    assert changed.exit_code == 2
    assert "max_length was 150 and is 140" in changed.stderr


def test_all_tasks_of_a_folder_unless_one_says_which(tmp_path: Path) -> None:
    """Those of LongBench-E by length too; and a picture of it."""
    picture = tmp_path / "scores.png"
    data = folder(tmp_path, musique=1, hotpotqa_e=1)
    result = run("--data", str(data), "--limit", "5", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "musique" in result.stdout
    assert "hotpotqa_e" in result.stdout
    assert "Score by length in words (questions)" in result.stdout
    assert "0-4k: 0.0 (1)" in result.stdout
    assert "sample" not in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"Wrote {picture}" in result.stderr


def test_what_others_published_stands_below(tmp_path: Path) -> None:
    """Marked as such, with its source, for a model that is called like one of theirs."""
    named = tmp_path / "Llama-2-7b-chat-hf"
    named.symlink_to(MODEL_DIR)
    data = folder(tmp_path, triviaqa=1)
    result = run("--data", str(data), "--model", str(named))
    assert result.exit_code == 0, result.output
    assert "Published for Llama-2-7b-chat-hf, not measured here" in result.stdout
    assert "[1] KIVI, arXiv 2402.02750, table 4" in result.stdout
    assert "[2] huggingface.co/blog/kv-cache-quantization" in result.stdout
    assert ["triviaqa", "84.28", "84.13", "84.84", "84.28", "84.76", "63.64"] in [
        line.split() for line in result.stdout.splitlines()
    ]
    assert "Published" not in run(*ONE_TASK, "--model", str(named)).stdout


@pytest.mark.parametrize("options", [(), ("--sample", "--data", ".")])
def test_without_data_it_is_said_where_they_come_from(options: tuple[str, ...]) -> None:
    """And that there is a sample to try."""
    result = run(*options)
    assert result.exit_code == 2
    told = " ".join(result.stderr.split())
    assert "Give either --data DIR, a folder with LongBench's files: dataset2prompt.json and" in told
    assert "or --sample, which needs nothing" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sample --tasks trec,hotpot_qa", "unknown task 'hotpot_qa'. Did you mean 'hotpotqa'"),
        ("--sample --tasks musique", "an entry for musique"),
        ("--data nowhere", "data='nowhere' cannot work: expected a folder with LongBench's files"),
        ("--sample --max-length 2048", "max_length=2048 cannot work: expected at most 20"),
        ("--sample --max-length 1", "max_length=1 cannot work: expected at least 2 tokens"),
        ("--sample --chat", "chat=True cannot work: expected a model whose tokenizer has a chat template"),
        ("--sample --backends hqqq:2", "unknown backend 'hqqq'. Did you mean 'hqq'?"),
        ("--sample --plot nowhere/scores.png", "nowhere"),
        ("--sample --limit 0", "0 is not in the range x>=1"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(options: str, message: str) -> None:
    """Without a traceback, with the exit code of bad usage."""
    result = run(*options.split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_line_that_is_no_question_is_named(tmp_path: Path) -> None:
    """By file and number."""
    data = folder(tmp_path, hotpotqa=2)
    with (data / "hotpotqa.jsonl").open("a") as file:
        file.write('{"input": "Who?"}\n')
    result = run("--data", str(data), "--limit", "3")
    assert result.exit_code == 1
    assert "hotpotqa.jsonl, line 3: no text as 'context'" in result.stderr
    assert "Traceback" not in result.output

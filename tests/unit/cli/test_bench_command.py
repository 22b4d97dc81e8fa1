"""`kvquant bench` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvquant.cli.bench import bench
from kvquant.cli.main import cli
from kvquant.errors import ModelLoadError
from kvquant.evaluation.bench import DEFAULT_CACHES, DEFAULT_CONTEXTS, DTYPES, BenchOptions
from kvquant.evaluation.subject import SyntheticModel

TINY = "--layers 2 --hidden 64 --heads 4 --kv-heads 2 --head-dim 16 --steps 2 --rounds 2 --threads 1"
TINY += " --no-memory --contexts 64,200"


def test_a_table_for_each_context() -> None:
    """With the machine, the caches, and what the figures mean."""
    result = CliRunner().invoke(bench, [*TINY.split(), "--caches", "dynamic,kvquant:reference:4"])
    assert result.exit_code == 0, result.output
    for text in (
        "64 tokens",
        "200 tokens",
        "dynamic",
        "kvquant:reference:4",
        "torch 2",
        "synthetic",
        "1.00 (1.00-1.00)",
    ):
        assert text in result.stdout
    assert result.stderr == ""


def test_attention_alone_has_columns_of_its_own(tmp_path: Path) -> None:
    """And a plot is written where it was asked for, which standard output does not mention."""
    plot = tmp_path / "bench.png"
    arguments = [*TINY.split(), "--attention", "--caches", "dynamic,kvquant:reference:4", "--plot", str(plot)]
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 0, result.output
    for text in ("cache and attention alone", "x limit", "GB/s", "attention over quantised tokens by torch"):
        assert text in result.stdout
    assert result.stderr == f"Wrote {plot}\n"
    assert plot.stat().st_size > 10_000


def test_what_a_part_costs() -> None:
    """Beside plain codes of the same bits, whose name may be short."""
    caches = "kvquant:reference:4,kvquant:reference:4:smoothing_key=true,kvquant:balanced:group_size=16"
    small = ["--attention", "--contexts", "256", "--caches", caches, "--against", "kvquant:reference"]
    result = CliRunner().invoke(bench, [*TINY.split(), *small])
    assert result.exit_code == 0, result.output
    assert "Faster than --against, which is kvquant:reference:4: times" in " ".join(result.stdout.split())
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip().startswith("kvquant:")}
    assert "1.00 (1.00-1.00)" in rows["kvquant:reference:4"]
    assert {"kvquant:balanced:group_size=16", "kvquant:reference:4:smoothing_key=True"} <= set(rows)


def test_json_is_all_that_json_prints() -> None:
    """So another program can read it."""
    result = CliRunner().invoke(bench, [*TINY.split(), "--caches", "dynamic", "--json"])
    report = json.loads(result.stdout)
    assert [made["context"] for made in report["results"]] == [64, 200]
    assert report["options"]["synthetic"]["hidden"] == 64


def test_a_cache_that_is_not_available_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are measured all the same."""
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)
    result = CliRunner().invoke(bench, [*TINY.split(), "--caches", "dynamic,transformers:quanto"])
    assert result.exit_code == 0
    assert "transformers:quanto:4: not available" in result.stdout
    assert "1.00 (1.00-1.00)" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--caches dynamik", "Did you mean 'dynamic'"),
        ("--caches kvquant:reference:5", "nbits"),
        ("--caches kvquant:referense:4", "reference"),
        ("--contexts 4q", "4k,32768"),
        ("--caches kvquant:reference:2:sink_length=-1", "sink_length=-1 cannot work: expected"),
        (
            "--caches dynamic,kvquant:smallest --against kvquant:small",
            "against='kvquant:small' cannot work: expected one of the caches compared: dynamic, kvquant:smallest",
        ),
        ("--steps 0", "at least 1"),
        ("--dtype int8", "bfloat16"),
        ("--threads 0", "threads"),
        ("--plot nowhere/at-all.png", "a folder that exists"),
        ("--attention --model here", "no model together with attention alone"),
    ],
)
def test_bad_input_is_a_usage_error_that_says_what_would_work(arguments: str, says: str) -> None:
    """Exit code 2 and no traceback."""
    result = CliRunner().invoke(bench, [*TINY.split(), *arguments.split()])
    assert result.exit_code == 2
    assert says in result.output


def test_a_model_that_is_not_there_is_named() -> None:
    """`kvquant.cli.main` prints the message."""
    result = CliRunner().invoke(bench, [*TINY.split(), "--model", "./nothing-here"])
    assert result.exit_code == 1
    assert isinstance(result.exception, ModelLoadError)
    assert "nothing-here" in str(result.exception)


def test_the_command_is_registered() -> None:
    """`kvquant bench --help` shows how caches are written."""
    result = CliRunner().invoke(cli, ["bench", "--help"])
    assert result.exit_code == 0
    assert "kind[:backend[:nbits]]" in result.stdout


def test_defaults_are_those_of_the_library() -> None:
    """The command writes them down again because reading them there would import torch for --help."""
    defaults = {option.name: option.default for option in bench.params}
    library = BenchOptions()
    assert (defaults["caches"], defaults["contexts"]) == (DEFAULT_CACHES, DEFAULT_CONTEXTS)
    assert {name: defaults[name] for name in vars(SyntheticModel())} == vars(SyntheticModel())
    for name in ("batch", "steps", "rounds", "dtype", "device", "seed", "memory", "prefill", "attention"):
        assert defaults[name] == getattr(library, name)
    dtype = next(option for option in bench.params if option.name == "dtype")
    assert tuple(dtype.type.choices) == DTYPES

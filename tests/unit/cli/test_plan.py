"""`kvquant plan` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvquant.cli.main import cli
from kvquant.demo import MODEL_DIR

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def run(*options: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *options])


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A file with the config of a model of 8 billion parameters, without a type for them."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def test_the_command_that_users_are_told_of(config: str) -> None:
    """Weights, a table over all widths with what fits, and the parts of the width asked for."""
    result = run("--model", config, *"--context 128k --batch 4 --backend hqq --nbits 2 --memory 24GB".split())
    assert result.exit_code == 0, result.output
    widths, _, parts = result.stdout.partition("What the cache is made of")
    for text in ("14.96 GiB, 8,030,261,248 parameters", "4 sequences of 131,072 tokens", "left of", "longest context"):
        assert text in widths
    assert [f"hqq:{nbits}" in widths for nbits in (8, 4, 3, 2, 1)] == [True] * 5
    assert "64.00 GiB" in widths  # 2 * 32 layers * 4 sequences * 8 heads * 128 channels * 131,072 tokens * 2 bytes
    assert [f"hqq:{nbits}" in parts for nbits in (8, 4, 3, 2, 1)] == [False, False, False, True, False]
    for text in ("codes", "scales", "window", "spare", "7.99 GiB"):
        assert text in parts
    assert "131,072 positions" in result.stdout


def test_without_a_memory_nothing_is_said_to_fit() -> None:
    """The shipped model, at its own positions, by the reference backend."""
    result = run()
    assert result.exit_code == 0, result.output
    for text in ("the shipped model", "1 sequence of 2,048 tokens", "reference:3", "Activations"):
        assert text in result.stdout
    assert "longest" not in result.stdout


def test_json_has_everything_and_nothing_beside_it(config: str) -> None:
    """Sizes in bytes, by part; the same each time."""
    first, second = (json.loads(run("--json", "--model", config, "--memory", "24GB").stdout) for _ in range(2))
    assert first["results"] == second["results"]
    assert first["kind"] == "plan"
    assert first["model"] == config
    assert first["settings"]["weights"]["nbytes"] == 2 * 8030261248 + 2 * 64 * 4
    assert first["settings"]["memory"] == 24 * 10**9
    assert first["settings"]["model"]["dtype"] == "bfloat16"
    for row in first["results"]:
        assert sum(row["parts"].values()) == row["nbytes"]
        assert row["total"] - row["nbytes"] == first["settings"]["weights"]["nbytes"]
        assert row["left"] == 24 * 10**9 - row["total"]


def test_a_picture(tmp_path: Path) -> None:
    """Where it was asked for; standard output does not mention it."""
    picture = tmp_path / "plan.png"
    result = run("--json", "--memory", "1GB", "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    json.loads(result.stdout)
    assert f"Wrote {picture}" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--memory 1MB", "The weights alone take 8.6 MiB more than there is: nothing fits."),
        ("--memory 11MB --overhead 2MB", "The weights and the overhead alone take"),
        ("--memory 11MB --overhead 1KB", "Beside weights and cache 1000 B are counted"),
        ("--context 8k", "The model has 2,048 positions, and the context is longer: that needs them extended."),
        ("--memory 1GB", "The model has 2,048 positions: what is longer and fits needs them extended."),
        ("--weights 3GB", "weights: 2.79 GiB, 4,983,552 parameters, as given"),
        ("--dtype float32", "states in float32"),
        ("--backend reference:2", "Where states need them in float32, at most so much more: reference:2"),
    ],
)
def test_what_one_should_know_is_said(options: str, message: str) -> None:
    """Beside the tables."""
    result = run(*options.split())
    assert result.exit_code == 0, result.output
    assert message in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--backend hqqq", "unknown backend 'hqqq'. Did you mean 'hqq'?"),
        ("--backend hqq --nbits 5", "nbits=5 cannot work"),
        ("--backend bitsandbytes --nbits 2", "nbits=2 is not supported; supported: 4, 8"),
        ("--context none", "context='none' cannot work"),
        ("--memory 24", "memory='24' cannot work: expected a size with its unit, such as 24GB"),
        ("--decode 2048", "decode=2048 cannot work: expected fewer tokens than the context of 2048"),
        ("--group-size 48", "group_size=48 does not divide head_dim=64"),
        ("--device warp", "device='warp'"),
        ("--plot plan.jpg", "plot='plan.jpg' cannot work"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(options: str, message: str) -> None:
    """Without a traceback, with the exit code of bad usage."""
    result = run(*options.split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_model_that_is_none(tmp_path: Path) -> None:
    """A folder without a config, and a file that says nothing of a model."""
    result = run("--model", str(tmp_path))
    assert result.exit_code == 1
    assert f"cannot load the model '{tmp_path}'" in result.stderr
    path = tmp_path / "config.json"
    path.write_text("{}")
    assert "cannot load the model" in run("--model", str(path)).stderr
    assert "Traceback" not in result.output


def test_the_config_of_a_model_may_be_a_folder_or_a_file() -> None:
    """The same plan."""
    folder, file = (
        json.loads(run("--json", "--model", str(path)).stdout) for path in (MODEL_DIR, MODEL_DIR / "config.json")
    )
    assert folder["results"] == file["results"]

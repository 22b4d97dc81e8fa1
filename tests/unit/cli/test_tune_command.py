"""`kvquant tune` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvquant import QuantizedCache
from kvquant.cli.main import cli
from kvquant.engine.config import CacheConfig

#: At every width as at 4 bits, so that bits are easily told.
CACHE = "reference:residual_length=32:smoothing_key=false:smoothing_value=false:scale_bits=16:scale=range"
SMALL = f"tune --backend {CACHE} --widths 2,4 --length 192 --prefill 128 --windows 1 --verify 2"


def run(*more: str) -> Result:
    return CliRunner().invoke(cli, [*SMALL.split(), *more])


def test_tables_a_verdict_and_a_config_that_loads(tmp_path: Path) -> None:
    """Bits by layer, what they are worth on held-out text, and a cache of what was found, with its picture."""
    config, picture = tmp_path / "tuned.yaml", tmp_path / "tuned.png"
    result = run("--budget", "3.1", "--config-out", str(config), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    for text in (
        "the shipped model, float32; at most 3.1 bits per element",
        "keys,",
        "values,",
        "at 2",
        "Held-out text",
    ):
        assert text in result.stdout
    assert "tuned: KL " in result.stdout
    assert " bits; uniform 2: KL " in result.stdout
    assert ", ratio 0." in result.stdout
    assert "better on held-out text" in result.stdout
    assert f"Wrote {config}: tuned to 3.1 bits" in result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert config.read_text().startswith("# tuned to 3.1 bits, for the shipped model; kvquant ")
    cache = QuantizedCache.from_config(config)
    assert cache.config.layers
    assert cache.config.residual_length == 32


def test_what_was_found_is_printed_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the end takes nothing away."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    result = run("--budget", "3.1", "--json", "--config-out", str(tmp_path / "tuned.yaml"))
    assert result.exit_code == 2
    assert json.loads(result.stdout)["written"]
    assert "a file that can be written ([Errno 28] No space left on device)" in result.stderr


def test_another_budget_goes_on_with_what_was_measured(tmp_path: Path) -> None:
    """Sensitivities do not depend on it; the config has the layers of the JSON, and a second run says the same."""
    output, config = tmp_path / "run.jsonl", tmp_path / "tuned.json"
    first = json.loads(run("--budget", "3.1", "--json", "--output", str(output)).stdout)
    before = output.read_text().splitlines()
    again = json.loads(run("--budget", "3.1", "--json", "--output", str(output), "--config-out", str(config)).stdout)
    assert output.read_text().splitlines() == before
    assert again["results"] == first["results"]
    assert CacheConfig.from_file(config) == CacheConfig.from_dict(first["config"])
    assert run("--budget", "4", "--json", "--output", str(output)).exit_code == 0
    added = output.read_text().splitlines()[len(before) :]
    assert 0 < len(added) <= 4  # two held-out windows of at most two other caches


def test_memory_in_place_of_bits() -> None:
    """The bits that it leaves, and what the result takes."""
    result = run(*"--memory 24MB --context 2k --batch 2 --overhead 1MB --json".split())
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    budget = report["settings"]["budget"]
    assert 2.5 < budget["bits"] < 4.5
    assert (budget["memory"], budget["overhead"], budget["context"], budget["batch"]) == (24e6, 1e6, 2048, 2)
    for takes in budget["takes"].values():
        assert takes + budget["weights"] + budget["overhead"] <= budget["memory"]


def test_widths_may_be_fractions_and_options_go_before_the_default() -> None:
    """Without --backend, of the cache that measured best, and it has what --group-size and its like say."""
    small = "tune --widths 2,2.5 --length 160 --prefill 144 --windows 1 --verify 2 --budget 3.3 --json"
    shared = "--residual-length 32 --group-size 32"
    result = CliRunner().invoke(cli, [*small.split(), *shared.split()])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["settings"]["widths"] == [2, 2.5]
    assert (report["config"]["group_size"], report["config"]["residual_length"]) == (32, 32)
    assert (report["config"]["rotation_value"], report["config"]["sink_length"]) == ("hadamard", 4)
    measured, predicted = report["results"][0]["bits_per_element"], [row["bits"] for row in report["streams"]]
    assert min(map(min, predicted)) <= measured <= 3.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "budget=None cannot work: expected bits per element, such as 2.5, or else a --memory"),
        ("--budget 2", "budget=2.0 cannot work: expected 2.5 to 4.5 bits per element"),
        ("--budget 3 --memory 8GB", "budget=3.0"),
        ("--budget 3 --context 64k", "context=65536 cannot work: expected a --memory"),
        ("--memory 21MB", "memory='20.0 MiB' cannot work: expected at least"),
        ("--memory 8", "memory='8' cannot work: expected a size with its unit"),
        ("--budget 3 --widths 2,5", "widths=5 cannot work: expected widths that reference has"),
        ("--budget 3 --backend hqqq", "unknown backend 'hqqq'. Did you mean 'hqq'?"),
        ("--budget 3 --length 20k", "length=20480 cannot work: expected at most 2048 tokens"),
        ("--budget 3 --prefill 64", "prefill=64 cannot work: expected at least 96 tokens"),
        ("--budget 3 --windows 900", "text='42874 tokens' cannot work: expected at least"),
        ("--budget 3 --config-out tuned.txt", "config_out='tuned.txt'"),
        ("--budget 3 --config-out nowhere/tuned.yaml", "a file in a folder that exists"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(options: str, message: str) -> None:
    """Without a traceback, with the exit code of bad usage."""
    result = run(*options.split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""

"""`kvquant cache` as it is typed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from kvquant import CacheConfig, QuantizedCache
from kvquant.cli.main import cli
from kvquant.demo import MODEL_DIR
from tests.unit.cache.files import tampered

TEXT = "The harbour master wrote down every ship that came in, and every one that did not. " * 12


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prompt.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def original(text: Path) -> Path:
    options = ["--nbits", "2", "--residual-length", "32", "--sink-length", "4"]
    path = text.with_name("prompt.kvq")
    result = CliRunner().invoke(cli, ["cache", "prefill", "--text", str(text), "--output", str(path), *options])
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(original, tmp_path / "prompt.kvq"))


def test_a_prefill_is_what_a_model_goes_on_from(saved):
    """The shipped model generates from the file what it generates from the text."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    loaded = QuantizedCache.load(saved, model=model)
    fresh = QuantizedCache.from_config(loaded.config, model.config)
    with torch.inference_mode():
        model(loaded.token_ids, past_key_values=fresh, use_cache=True)
    ids = torch.cat([loaded.token_ids, loaded.token_ids[:, :1]], dim=1)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    texts = [model.generate(ids, past_key_values=cache, **options) for cache in (loaded, fresh)]
    assert torch.equal(*texts)


def test_options_from_a_file_and_a_chunk_at_a_time(kvquant, text, tmp_path):
    """What is typed goes before the file; as many tokens are in the cache."""
    config = CacheConfig(nbits=8, group_size=16, residual_length=16)
    (tmp_path / "cache.yaml").write_text(config.to_yaml())
    options = ["--text", str(text), "--config", str(tmp_path / "cache.yaml"), "--nbits", "4", "--chunk", "50", "--json"]
    result = kvquant("cache", "prefill", *options, "--output", str(tmp_path / "prompt.kvq"))
    told = json.loads(result.stdout)
    assert (told["config"]["nbits"], told["config"]["group_size"]) == (4, 16)
    assert told["tokens"] == told["token_ids"][1] > 200
    assert QuantizedCache.load(tmp_path / "prompt.kvq").get_seq_length() == told["tokens"]


def test_info_says_what_a_file_is(kvquant, saved):
    """In a table, and in JSON."""
    shown = kvquant("cache", "info", str(saved))
    assert shown.exit_code == 0
    for words in (
        "format 1",
        "LlamaForCausalLM, float32",
        "nbits=2",
        "sink_length=4",
        "transformers 5",
        "0-4",
        "quantized",
    ):
        assert words in shown.stdout
    told = json.loads(kvquant("cache", "info", str(saved), "--json").stdout)
    cache = QuantizedCache.load(saved)
    assert told["nbytes"] == saved.stat().st_size
    for layer, held in zip(told["layers"], cache.memory_report().layers, strict=True):
        assert layer["tokens"] == held.tokens == told["tokens"]
        assert layer["quantized_tokens"] == held.quantized_tokens
        assert layer["nbytes"] == held.nbytes - held.parts["spare"]


def test_info_reads_no_tensor(saved):
    """Neither torch nor the numbers: a file whose numbers are gone can still be asked."""
    code = (
        "import sys; from click.testing import CliRunner; from kvquant.cli.main import cli; "
        "result = CliRunner().invoke(cli, ['cache', 'info', sys.argv[1], '--json']); "
        "assert result.exit_code == 0, result.output; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True)
    damaged = bytearray(saved.read_bytes())
    damaged[-1] ^= 1
    saved.write_bytes(damaged)
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True)


def test_verify_says_that_a_file_is_whole(kvquant, saved):
    """And whose cache it is."""
    result = kvquant("cache", "verify", str(saved), "--model", str(MODEL_DIR))
    assert result.exit_code == 0, result.output
    assert f"is whole: {QuantizedCache.load(saved).get_seq_length()} tokens in 5 layers" in result.stdout
    assert json.loads(kvquant("cache", "verify", str(saved), "--json").stdout)["whole"] is True


def test_verify_finds_damage(kvquant, saved):
    """One error, no traceback, exit code 1."""
    damaged = bytearray(saved.read_bytes())
    damaged[-1] ^= 1
    saved.write_bytes(damaged)
    result = kvquant("cache", "verify", str(saved))
    assert result.exit_code == 1
    assert "was altered after it was saved" in result.stderr
    assert result.stdout == ""


def test_verify_finds_another_model(kvquant, saved):
    """It says what differs."""
    tampered(saved, lambda told: told["model"].update(weights="0" * 16))
    result = kvquant("cache", "verify", str(saved), "--model", str(MODEL_DIR))
    assert result.exit_code == 1
    assert "the cache of another model. Its weights are others." in result.stderr


def test_what_a_file_says_does_not_reach_the_terminal_as_it_is(kvquant, saved):
    """Control characters could forge output."""
    tampered(saved, lambda told: told["model"].update(architecture="\x1b[2JLlama\n\rforged"))
    result = kvquant("cache", "info", str(saved))
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\r" not in result.stdout


@pytest.mark.parametrize("change", [{"layers": 3}, {"versions": []}, {"model": 1}, {"config": None}])
def test_a_description_that_is_none(kvquant, saved, change):
    """Is an error and no traceback."""
    result = kvquant("cache", "info", str(tampered(saved, lambda told: told.update(change))))
    assert result.exit_code == 1
    assert "cannot load" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--nbits 5", "nbits=5"),
        ("--backend hqqq", "unknown backend 'hqqq'. Did you mean 'hqq'?"),
        ("--output nowhere/prompt.kvq", "output='nowhere/prompt.kvq' cannot work: expected a file in a folder"),
        ("--device warp", "device='warp'"),
        ("--text nowhere.txt", "nowhere.txt' does not exist"),
        ("--group-size 48", "group_size=48 does not divide head_dim=64"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(kvquant, text, tmp_path, options, message):
    """Without a traceback, and nothing is written."""
    given = ["--text", str(text), "--output", str(tmp_path / "prompt.kvq"), *options.split()]
    result = kvquant("cache", "prefill", *given)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_long_or_empty(kvquant, tmp_path):
    """The model sees 2048 tokens, and one at least."""
    for words, message in ((TEXT * 20, "expected at most 2048 tokens"), ("", "expected some text")):
        (tmp_path / "prompt.txt").write_text(words)
        result = kvquant(
            "cache", "prefill", "--text", str(tmp_path / "prompt.txt"), "--output", str(tmp_path / "prompt.kvq")
        )
        assert result.exit_code == 2
        assert message in result.stderr

"""`kvquant support`: what it says of families and of models, and the page that its table is on."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from transformers import LlamaForCausalLM, MambaForCausalLM

from kvquant.cli.main import cli
from kvquant.evaluation.support.check import make
from kvquant.evaluation.support.families import FAMILIES
from kvquant.evaluation.support.table import HEADINGS
from tests.support import SMALL_MODEL

PAGE = Path(__file__).parents[3] / "docs" / "models.md"


def run(*arguments):
    return CliRunner().invoke(cli, ["support", *arguments])


def families(*arguments):
    return run("families", "--only", "Llama", "--only", "mamba", *arguments)


def test_the_group_names_its_commands():
    """Without importing them."""
    text = run("--help").output
    assert all(command in text for command in ("families", "modes", "model"))


def test_a_table_says_what_works():
    """Each family on a line, in the order asked for, whatever the case of its name; a refused one with the reason."""
    result = families()
    assert result.exit_code == 0, result.output
    assert re.search(r"Llama +2 of 2 quantised +as DynamicCache +56 of 69 +0\.\d% +fused", result.output)
    assert re.search(r"Mamba +refused +recurrent states alone", result.output)
    assert "2 families: 1 work, 1 of them fused, 1 refused, 0 wrong." in result.output
    assert f"reference, 8 bits; kvquant 0.1.0, torch {torch.__version__}" in result.output


def test_a_table_in_markdown_is_one():
    """With as many cells in each line."""
    lines = [line for line in families("--markdown").output.splitlines() if line.startswith("|")]
    assert lines[0] == f"| {' | '.join(HEADINGS)} |"
    assert {line.count("|") for line in lines} == {len(HEADINGS) + 1}
    assert len(lines) == 4


def test_json_has_the_figures():
    """And what is wrong, which is nothing."""
    told = json.loads(families("--json", "--nbits", "4").stdout)
    llama, mamba = told["families"]
    assert told["options"] == {"backend": "reference", "nbits": 4}
    assert told["versions"]["transformers"] == transformers.__version__
    assert llama["layers"] == {"quantised": 2}
    assert llama["equal"] is True
    assert 0 < llama["deviation"] < 0.2
    assert llama["steps"] == "fused"
    assert mamba["status"] == "refused"
    assert "2 of type linear_attention" in mamba["reason"]
    assert llama["problems"] == mamba["problems"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--only", "lama"], 2, "unknown family name 'lama'. Did you mean 'llama'"),
        (["--backend", "nothing"], 1, "unknown backend 'nothing'"),
        (["--nbits", "7"], 2, "nbits=7 cannot work"),
    ],
)
def test_what_there_is_not_is_refused(arguments, code, message):
    """Before any family is run."""
    result = run("families", *arguments)
    assert result.exit_code == code
    assert message in result.stderr


def test_a_family_that_fails_makes_the_command_fail(monkeypatch):
    """So that a CI that runs it is red."""
    monkeypatch.setattr(LlamaForCausalLM, "prepare_inputs_for_generation", lambda *_, **__: {"none": None})
    result = families()
    assert result.exit_code == 1
    assert "failed: " in result.output
    assert "1 wrong" in result.output


# ------------------------------------------------------------------------------------------------ a model


def saved(kind, options, folder):
    make(kind, options).save_pretrained(folder)
    return str(folder)


def model(path, *arguments):
    return run("model", "--model", path, "--group-size", "8", "--residual-length", "8", *arguments)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(LlamaForCausalLM, SMALL_MODEL, tmp_path_factory.mktemp("llama"))


def test_a_model_that_works_is_told_so(llama):
    """On one line, under what was found."""
    result = model(llama)
    assert result.exit_code == 0, result.output
    assert re.search(r"layers +2 of 2 quantised", result.output)
    assert re.search(r"model .*LlamaForCausalLM, sdpa attention", result.output.replace("\n", ""))
    assert "works with a quantised cache, and attention reads it packed." in " ".join(result.output.split())


def test_a_model_told_in_json(llama):
    """The figures, the options and what is wrong."""
    told = json.loads(model(llama, "--json").stdout)
    assert told["options"] == {"backend": "reference", "nbits": 8, "group_size": 8, "residual_length": 8}
    assert told["quantised"] == 24
    assert told["problems"] == []


def test_so_short_a_prompt_that_nothing_is_quantised_is_wrong(tmp_path):
    """A model with few positions cannot be checked with a long window."""
    path = saved(LlamaForCausalLM, {**SMALL_MODEL, "max_position_embeddings": 32}, tmp_path)
    result = run("model", "--model", path)
    assert result.exit_code == 1
    assert "nothing was quantised" in " ".join(result.output.split())


def test_a_model_that_cannot_is_told_why(tmp_path):
    """With exit code 1."""
    path = saved(MambaForCausalLM, {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}, tmp_path)
    result = model(path)
    assert result.exit_code == 1
    assert "none of its layers (2 of type linear_attention)" in " ".join(result.output.split())


@pytest.mark.parametrize("name", ["BART", "Whisper", "Qwen2.5-VL"])
def test_encoder_decoders_and_models_that_hear_or_see(name, tmp_path):
    """As they are loaded and run: with a cache of their kind, and images aside."""
    (family,) = (family for family in FAMILIES if family.name == name)
    path = saved(getattr(transformers, family.model), family.options, tmp_path)
    told = json.loads(model(path, "--json").stdout)
    assert told["model"] == family.model
    assert told["steps"] == "fused"
    assert told["problems"] == []
    assert bool(told["cross"]) == (name != "Qwen2.5-VL")


def test_a_folder_without_a_model_is_refused(tmp_path):
    """By the library's reason."""
    result = model(str(tmp_path))
    assert result.exit_code == 1
    assert "cannot load the model" in result.stderr


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_names_the_families_that_are_run():
    """Its table is the command's; run that again where a family was added."""
    rows = [line.split("|")[1].strip() for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert rows[rows.index("family") + 2 :] == [family.name for family in FAMILIES]


def test_the_page_has_no_family_that_does_not_work():
    """What is refused or not read packed has its reason in the last column."""
    text = PAGE.read_text(encoding="utf-8")
    assert "WRONG" not in text
    assert f"{len(FAMILIES)} families: " in text
    assert ", 0 wrong." in text
    for line in text.splitlines():
        if line.startswith("|") and ("| refused |" in line or "| dequantised |" in line):
            assert line.split("|")[-2].strip()

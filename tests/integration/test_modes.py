"""Every way of generating, as `kvquant support modes` runs it, and what docs/generation.md says of it.

Counterparts of what transformers' own tests of caches check (its tests/utils/test_cache_utils.py and the cache tests of
its generation mixin, by description):

| there | here |
|---|---|
| batched, left padding, sampling, beam search, several returned | `test_it_works` |
| extra left padding changes nothing | `test_extra_left_padding_changes_nothing` |
| continuing generation, reuse of a prefilled cache | `test_it_works`, `test_copies_of_a_prefilled_cache_...` |
| reorder, repeat, select, reset, crop of a layer | tests/unit/cache |
| reset and used again by `generate` | `test_a_cache_that_was_reset_generates_as_a_new_one` |
| quantised with several backends | `test_every_backend_generates` |
| a cache made by generate, of a config and by its name | test_install.py |
| assisted decoding, crop | test_assisted.py |
| static shapes, offloading, export | tests of compiling and of offloading |
| iteration, and a dynamic cache made of it | `test_a_dynamic_cache_can_be_made_of_it` |
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig

from kvquant import QuantizedCache
from kvquant.cli.main import cli
from kvquant.evaluation.support import tiny
from kvquant.evaluation.support.modes import MODES
from kvquant.evaluation.support.runs import Caches, Mode, run_modes
from kvquant.integrations.modes import INTEGRATION_MODES
from tests.support import SMALL_MODEL

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"
ALL = {mode.name: mode for mode in (*MODES, *INTEGRATION_MODES)}

#: Modes that transformers itself has no longer, or that take no cache.
GONE = {"group beam search", "constrained beam search", "contrastive search", "DoLa", "continuous batching"}
#: Modes in which something reads the numbers.
DEQUANTISED = {
    "output_attentions",
    "forward in a loop with gradients on",
    "backward through a step",
    "inference mode and then outside",
}


@pytest.mark.parametrize("name", sorted(set(ALL) - GONE - {"kvpress"}))  # kvpress has tests of its own
def test_it_works(name):
    """The same as with a DynamicCache while nothing is quantised, and fused where nothing reads the numbers."""
    (result,) = run_modes([ALL[name]], {"backend": "reference", "nbits": 4})
    assert (result.error, result.missing) == ("", "")
    assert result.equal
    assert result.quantized >= 64
    assert (result.fused > 0, result.dequantized > 0) == (name not in DEQUANTISED, name in DEQUANTISED)


@pytest.mark.parametrize("name", sorted(GONE))
def test_what_transformers_has_no_longer_has_its_reason(name):
    """No unexplained gap."""
    (result,) = run_modes([ALL[name]], {"backend": "reference", "nbits": 4})
    assert result.works
    assert "transformers-community" in result.missing or "paged cache of its own" in result.missing


def test_a_cache_that_gives_something_else_is_found_out():
    """The table would say so."""

    def forgetful(caches: Caches) -> torch.Tensor:
        return torch.tensor([caches.options is None])

    def failing(caches: Caches) -> torch.Tensor:
        if caches.options is not None:
            raise ValueError("no such luck")
        return torch.tensor([1])

    different, failed = run_modes([Mode("forgets", forgetful), Mode("fails", failing)], {})
    assert (different.equal, different.works) == (False, False)
    assert (failed.error, failed.works) == ("ValueError: no such luck", False)


def test_the_page_names_the_modes_that_the_command_runs():
    """Each has its row, in the same order."""
    section = PAGE.read_text().partition("## Every mode")[2]
    rows = re.findall(r"^\| ([^|]+) \|", section, flags=re.MULTILINE)
    assert rows == ["mode", *ALL]


def test_the_examples_of_the_page_run(monkeypatch):
    """With the model that kvquant ships."""
    pytest.importorskip("kvpress")
    model, tokenizer = tiny.shipped()
    inputs = tokenizer("The first element of the list is returned. " * 8, return_tensors="pt")
    known = {"model": model, "tokenizer": tokenizer, "inputs": inputs, "torch": torch, "copy": copy}
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), {**known, "QuantizedCache": QuantizedCache})  # noqa: S102  # our own
    assert len(examples) == 7


def test_the_command_prints_a_table():
    """With a row for what runs."""
    result = CliRunner().invoke(cli, ["support", "modes", "--nbits", "2", "--mode", "greedy"])
    assert result.exit_code == 0
    assert re.search(r"greedy +same +128 of 161 +fused", result.stdout)


@pytest.mark.parametrize(
    ("form", "told"), [("--markdown", "| DoLa |  |  |  | cannot be run"), ("--json", '"mode": "DoLa"')]
)
def test_the_command_writes_for_pages_and_programs(form, told):
    """What cannot be run is no failure."""
    result = CliRunner().invoke(cli, ["support", "modes", "--mode", "DoLa", form])
    assert result.exit_code == 0
    assert told in result.stdout


def test_an_unknown_mode_is_refused():
    """With those that there are."""
    result = CliRunner().invoke(cli, ["support", "modes", "--mode", "greed"])
    assert result.exit_code == 2
    assert "unknown mode 'greed'. Did you mean 'greedy'?" in result.stderr


# -------------------------------------------------------------------------------------------- beside the table

SMALL = {"group_size": 16, "residual_length": 16}


def text(cache, ids=None, mask=None, tokens=20):
    """The tokens that a tiny Llama generates."""
    ids = tiny.prompt()["input_ids"] if ids is None else ids
    mask = torch.ones_like(ids) if mask is None else mask
    out = tiny.decoder().generate(
        ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=tokens
    )
    return out[:, -tokens:]


@pytest.mark.parametrize(("backend", "nbits"), [("reference", 2), ("hqq", 4), ("quanto", 4), ("bitsandbytes", 8)])
def test_every_backend_generates(backend, nbits):
    """A batch with the body in use."""
    if backend != "reference":
        pytest.importorskip({"quanto": "optimum.quanto"}.get(backend, backend))
    cache = QuantizedCache(backend=backend, nbits=nbits, residual_length=16, config=tiny.decoder().config)
    assert text(cache).shape == (1, 20)
    assert cache.memory_report().layers[0].quantized_tokens == 128


def test_extra_left_padding_changes_nothing():
    """While nothing is quantised: groups are of tokens, wherever a row begins."""
    ids = tiny.prompt()["input_ids"]
    padded = torch.cat([torch.ones(1, 13, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 13).long()[None]
    plain = text(QuantizedCache(residual_length=1000, config=tiny.decoder().config))
    assert torch.equal(text(QuantizedCache(residual_length=1000, config=tiny.decoder().config), padded, mask), plain)


def test_a_cache_that_was_reset_generates_as_a_new_one():
    """Of another batch size too."""
    cache = QuantizedCache(**SMALL, config=tiny.decoder().config)
    first = text(cache)
    cache.reset()
    text(cache, tiny.prompt(batch=3)["input_ids"])
    cache.reset()
    assert torch.equal(text(cache), first)


def test_copies_of_a_prefilled_cache_are_independent():
    """What one goes on with is not seen by another, nor by the original."""
    model, ids = tiny.decoder(), tiny.prompt()["input_ids"]
    prefilled = QuantizedCache(**SMALL, config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=prefilled)
    before = [layer.keys for layer in prefilled.layers]
    asked = [torch.cat([ids, torch.full((1, 5), 4 + question)], dim=1) for question in range(2)]
    alone = [text(copy.deepcopy(prefilled), each) for each in asked]
    copies = [copy.deepcopy(prefilled) for _ in asked]
    assert [torch.equal(text(each, ids), one) for each, ids, one in zip(copies, asked, alone, strict=True)] == [
        True
    ] * 2
    assert prefilled.get_seq_length() == ids.shape[1]
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(prefilled.layers, before, strict=True))


@pytest.mark.parametrize("window", [None, 24])
def test_a_dynamic_cache_can_be_made_of_it(window):
    """By iterating over layers, as transformers' own caches allow; then generation goes on in full precision."""
    config = MistralConfig(**SMALL_MODEL, sliding_window=window)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = QuantizedCache(nbits=8, group_size=16, residual_length=8, config=config)
    ids = torch.randint(2, 128, (2, 50))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :3], past_key_values=cache)
    dynamic = DynamicCache(cache)
    assert dynamic.is_sliding == cache.is_sliding
    for layer, ours in zip(dynamic.layers, cache.layers, strict=True):
        held = layer.keys.shape[2]
        assert torch.equal(layer.keys, ours.keys[:, :, -held:])
        assert torch.equal(layer.values, ours.values[:, :, -held:])

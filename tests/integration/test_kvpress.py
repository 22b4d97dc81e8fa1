"""Presses of the real kvpress with quantised caches: prune, then quantise."""

import contextlib
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvquant import QuantizedCache
from kvquant.cache.layer import QuantizedLayer
from kvquant.errors import ReadOnlyStatesError
from kvquant.integrations.kvpress import pressed
from tests.support import SMALL_MODEL

PROMPT = 96


@pytest.fixture(scope="module")
def kvpress():
    """The package; what it changes in transformers when it is imported is changed back afterwards."""
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        package = pytest.importorskip("kvpress")
    yield package
    for name, function in before.items():
        ALL_ATTENTION_FUNCTIONS[name] = function


@pytest.fixture(scope="module")
def model(kvpress):
    """A tiny Llama, made once kvpress has patched the attention."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_MODEL)).eval()


#: Presses that score keys and values, attention, queries to come, or channels, and those that are made of others.
PRESSES = {
    "KnormPress": lambda kvpress: kvpress.KnormPress(0.5),
    "ExpectedAttentionPress": lambda kvpress: kvpress.ExpectedAttentionPress(0.5),
    "SnapKVPress": lambda kvpress: kvpress.SnapKVPress(0.5, window_size=16),
    "StreamingLLMPress": lambda kvpress: kvpress.StreamingLLMPress(0.5),
    "TOVAPress": lambda kvpress: kvpress.TOVAPress(0.5),
    "ThinKPress": lambda kvpress: kvpress.ThinKPress(0.5, window_size=16),
    "KeyRerotationPress": lambda kvpress: kvpress.KeyRerotationPress(kvpress.KnormPress(0.5)),
    "ChunkPress": lambda kvpress: kvpress.ChunkPress(kvpress.KnormPress(0.5), chunk_length=32),
    "ComposedPress": lambda kvpress: kvpress.ComposedPress([kvpress.KnormPress(0.3), kvpress.StreamingLLMPress(0.3)]),
}


def prompt():
    return torch.randint(2, 128, (1, PROMPT), generator=torch.Generator().manual_seed(1))


def decoded(model, cache, press, *, while_decoding=False, tokens=8):
    """The logits of some tokens after a pruned prompt."""
    logits = []
    with torch.no_grad():
        with pressed(model, press):
            logits.append(model(prompt(), past_key_values=cache).logits[:, -1])
        with pressed(model, press) if while_decoding else contextlib.nullcontext():
            for step in range(tokens):
                at = torch.tensor([[PROMPT + step]])
                ids = logits[-1].argmax(1, keepdim=True)
                logits.append(model(ids, past_key_values=cache, position_ids=at).logits[:, -1])
    return torch.cat(logits)


@pytest.mark.parametrize("name", PRESSES)
def test_with_everything_in_the_window_it_is_as_with_a_dynamic_cache(kvpress, model, name):
    """The press does the same to both."""
    theirs, ours = DynamicCache(config=model.config), QuantizedCache(residual_length=1000, config=model.config)
    expected = decoded(model, theirs, PRESSES[name](kvpress))
    torch.testing.assert_close(decoded(model, ours, PRESSES[name](kvpress)), expected, rtol=1e-4, atol=1e-5)
    assert theirs.get_seq_length() == ours.get_seq_length()


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("lazy", [False, True])
def test_what_the_press_keeps_is_quantised_once(kvpress, model, name, lazy):
    """From the states themselves: the store is that of the pruned states."""
    theirs = DynamicCache(config=model.config)
    ours = QuantizedCache(nbits=2, group_size=16, residual_length=8, config=None if lazy else model.config)
    with torch.no_grad():
        for cache in (theirs, ours):
            with pressed(model, PRESSES[name](kvpress)):
                model(prompt(), past_key_values=cache)
    kept = theirs.get_seq_length()
    for theirs_layer, layer in zip(theirs.layers, ours.layers, strict=True):
        expected = QuantizedLayer(ours.config, layer.index)
        expected.update(theirs_layer.keys, theirs_layer.values)
        assert torch.equal(layer.keys, expected.keys)
        assert torch.equal(layer.values, expected.values)
        assert len(layer.stores[0].body) == (kept - 8) // 16 * 16 > 0


def test_a_press_may_prune_while_decoding(kvpress, model):
    """It then reads what is quantised, and what it keeps is quantised anew."""

    def press():
        inner = kvpress.KnormPress()
        return kvpress.DecodingPress(inner, compression_interval=4, target_size=40)

    theirs, ours = DynamicCache(config=model.config), QuantizedCache(residual_length=1000, config=model.config)
    expected = decoded(model, theirs, press(), while_decoding=True)
    torch.testing.assert_close(decoded(model, ours, press(), while_decoding=True), expected, rtol=1e-4, atol=1e-5)
    packed = QuantizedCache(nbits=8, group_size=16, residual_length=8, config=model.config)
    decoded(model, packed, press(), while_decoding=True)
    assert packed.get_seq_length() == ours.get_seq_length() < PROMPT
    assert packed.memory_report().layers[0].quantized_tokens > 0


def test_generate_prunes_and_goes_on(kvpress, model):
    """In one call."""
    cache = QuantizedCache(nbits=8, group_size=16, residual_length=8, config=model.config)
    with pressed(model, kvpress.KnormPress(0.5)):
        out = model.generate(
            prompt(), attention_mask=torch.ones_like(prompt()), past_key_values=cache, max_new_tokens=6, do_sample=False
        )
    assert out.shape == (1, PROMPT + 6)
    assert cache.get_seq_length() == PROMPT // 2 + 5


def test_presses_that_write_into_the_keys_are_refused(kvpress, model):
    """Those that prune each head by itself, once there is something that would be lost."""
    cache = QuantizedCache(nbits=8, group_size=16, residual_length=8, config=model.config)
    with pytest.raises(ReadOnlyStatesError):
        decoded(model, cache, kvpress.AdaKVPress(kvpress.KnormPress(0.5)))


def test_a_press_that_fails_leaves_the_cache_in_order(kvpress, model):
    """Its layers are quantised ones, and hooks are gone."""

    class Failing(kvpress.KnormPress):
        def compress(self, *_args):
            raise RuntimeError("no such luck")

    cache = QuantizedCache(config=model.config)
    with pytest.raises(RuntimeError, match="no such luck"):
        decoded(model, cache, Failing(0.5))
    assert all(isinstance(layer, QuantizedLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
    assert cache.get_seq_length() == PROMPT

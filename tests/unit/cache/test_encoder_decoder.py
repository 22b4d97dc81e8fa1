"""The cache of encoder-decoder models: both parts quantised, the encoder's states once, and read packed."""

import copy

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer

from kvquant import CacheConfig, QuantizedCache, QuantizedEncoderDecoderCache
from kvquant.attention.counters import counters
from kvquant.attention.states import QuantizedStates
from kvquant.cache.encoder_decoder import CrossLayer
from kvquant.cache.layer import QuantizedLayer
from kvquant.errors import (
    CropError,
    OptionValueError,
    StatesError,
    UnsupportedError,
)
from kvquant.evaluation.support import prompts
from tests.support import MinMax
from tests.unit.cache.encoder_decoders import (
    BART,
    ENCODED,
    EXACT,
    HEARING,
    LENGTH,
    MODES,
    OPTIONS,
    T5,
    bart_with_text,
    cache_for,
    filled,
    generate,
    made,
)


@pytest.fixture(scope="module")
def models():
    bart, text = bart_with_text()
    t5 = T5Config(**T5, num_layers=2, num_decoder_layers=2)
    return {
        "bart": (bart, text),
        "t5": (made(T5ForConditionalGeneration(t5)), text),
        "whisper": (
            made(WhisperForConditionalGeneration(WhisperConfig(**{**BART, **HEARING}))),
            prompts.log_mel(8, 2 * ENCODED),
        ),
    }


@pytest.fixture(scope="module")
def bart(models):
    return models["bart"]


@pytest.fixture(scope="module")
def once(bart):
    """A cache after a generation, and its tokens."""
    return filled(bart)


@pytest.fixture
def used(once):
    """A copy of them."""
    return copy.deepcopy(once)


# ------------------------------------------------------------------------------------------------ layers


def test_it_is_made_of_a_quantised_cache_and_one_of_the_encoder_s_states(bart):
    """A layer each for every layer of the decoder."""
    cache = cache_for(bart[0])
    assert isinstance(cache, EncoderDecoderCache)
    assert isinstance(cache.self_attention_cache, QuantizedCache)
    assert [type(layer) for layer in cache.self_attention_cache.layers] == [QuantizedLayer] * 2
    assert [type(layer) for layer in cache.cross_attention_cache.layers] == [CrossLayer] * 2
    assert len(cache) == 2
    assert not any(cache.is_updated.values())


def test_layers_are_the_decoder_s_where_the_encoder_has_another_number():
    """T5's config has one number for each, and its first is the encoder's."""
    config = T5Config(**T5, num_layers=1, num_decoder_layers=3)
    cache = QuantizedEncoderDecoderCache(config=config, **OPTIONS)
    assert len(cache.self_attention_cache.layers) == len(cache.cross_attention_cache.layers) == 3
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    model.generate(torch.tensor([[5, 6, 7]]), past_key_values=cache, max_new_tokens=3, min_new_tokens=3)
    assert [layer.get_seq_length() for layer in cache.self_attention_cache.layers] == [3, 3, 3]


def test_the_encoder_s_states_have_no_window(bart):
    """None of them is more recent than another; options of single layers too."""
    cache = cache_for(bart[0], layers={1: {"residual_length": 64, "nbits": 4}})
    own, cross = cache.self_attention_cache.layers[1], cache.cross_attention_cache.layers[1]
    assert (own.settings.residual_length, cross.settings.residual_length) == (64, 0)
    assert own.settings.key.nbits == cross.settings.key.nbits == 4
    assert cache.config.layers == {"1": {"residual_length": 64, "nbits": 4}}


def test_layers_can_be_left_out(bart):
    """In both parts, counted from the last too."""
    cache, tokens = filled(bart, skip_layers=[-1])
    assert [type(layer) for layer in cache.cross_attention_cache.layers] == [CrossLayer, DynamicLayer]
    assert [type(layer) for layer in cache.self_attention_cache.layers] == [QuantizedLayer, DynamicLayer]
    assert tokens.shape == (2, 25)


def test_it_needs_no_model_config(bart, once):
    """Layers come as they are used."""
    cache = QuantizedEncoderDecoderCache(**OPTIONS)
    assert torch.equal(generate(bart, cache), once[1])
    assert [type(layer) for layer in cache.cross_attention_cache.layers] == [CrossLayer] * 2


# ------------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize(
    ("name", "mode"), [*(("bart", mode) for mode in MODES), ("t5", "greedy"), ("whisper", "several beams returned")]
)
def test_generation_is_dynamic_cache_s_while_nothing_is_quantised(models, name, mode):
    """To the token."""
    pair = models[name]
    cache = cache_for(pair[0], **EXACT)
    assert torch.equal(generate(pair, cache, **MODES[mode]), generate(pair, **MODES[mode]))
    assert cache.bits_per_element is None


@pytest.mark.parametrize(
    ("name", "mode"),
    [("bart", "several beams returned"), ("t5", "greedy"), ("t5", "several beams returned"), ("whisper", "greedy")],
)
def test_attention_reads_both_parts_packed(models, name, mode):
    """In every step; what is generated is what attention over the dequantised states gives."""
    model, _ = pair = models[name]
    counters.reset()
    cache = cache_for(model)
    tokens = generate(pair, cache, **MODES[mode])
    # A step of a decoder of 2 layers attends to the encoder in each, and to its own tokens once some are quantised.
    assert counters.fused >= 2 * 23
    assert counters.materialised == 0
    assert [layer.quantized_tokens for layer in cache.memory_report().layers] == [16, 16, ENCODED, ENCODED]
    model.set_attn_implementation("eager")
    try:
        assert torch.equal(generate(pair, cache_for(model), **MODES[mode]), tokens)
    finally:
        model.set_attn_implementation("sdpa")
    assert counters.materialised > 0 or name == "t5"  # older versions of which know one attention only


def test_the_encoder_s_states_are_quantised_once(bart, backend):
    """However many tokens are generated."""
    seen = []

    class Counting(MinMax):
        def quantize(self, rows):
            seen.append(rows.numel())
            return super().quantize(rows)

    cache = cache_for(bart[0], backend=backend(Counting), residual_length=64)  # of the decoder's tokens none
    generate(bart, cache)
    assert sum(seen) == 2 * 2 * 2 * 2 * ENCODED * 16  # layers, streams, batch, heads, tokens, channels


def test_assisted_decoding_takes_tokens_back(bart):
    """A draft model proposes, the cache forgets what was rejected, and tokens are those of plain decoding."""
    model, inputs = bart
    torch.manual_seed(3)
    draft = made(BartForConditionalGeneration(BartConfig(**BART)))
    draft.generation_config.num_assistant_tokens, draft.generation_config.num_assistant_tokens_schedule = 2, "constant"
    one = {name: value[1:] for name, value in inputs.items()}
    plain, assisted = cache_for(model), cache_for(model)  # whose window holds what can be rejected
    length = {**LENGTH, "max_new_tokens": 18, "min_new_tokens": 18}
    expected = model.generate(**one, past_key_values=plain, **length)
    assert torch.equal(model.generate(**one, past_key_values=assisted, assistant_model=draft, **length), expected)
    assert plain.memory_report().layers[0].quantized_tokens == 8
    assert assisted.get_seq_length() == plain.get_seq_length()


def test_a_plain_pair_of_quantised_caches_works(bart, once):
    """transformers' own class around two of ours: as its layers hand out plain tensors, it is right, and not fused."""
    pair = EncoderDecoderCache(QuantizedCache(**OPTIONS), QuantizedCache(**{**OPTIONS, "residual_length": 0}))
    assert torch.equal(generate(bart, pair), once[1])


# ------------------------------------------------------------------------------------------------ states


def states(tokens=20):
    torch.manual_seed(0)
    return torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16)


def test_the_first_attention_sees_the_states_themselves():
    """As transformers' own cache has it."""
    keys, values = states()
    assert CrossLayer(CacheConfig(**OPTIONS), 0).update(keys, values) == (keys, values)


def test_states_are_handed_out_packed():
    """As attributes, which is how models read them; read only, with the numbers of the store."""
    layer = CrossLayer(CacheConfig(**{**OPTIONS, "residual_length": 0}), 0)
    assert layer.keys is None
    assert layer.values is None
    keys, values = states()
    layer.update(keys, values)
    assert isinstance(layer.keys, QuantizedStates)
    assert isinstance(layer.values, QuantizedStates)
    torch.testing.assert_close(layer.keys.dequantize(), keys, atol=0.02, rtol=0)
    torch.testing.assert_close(layer.values.dequantize(), values, atol=0.02, rtol=0)
    assert torch.equal(layer.keys[:, :, 16:], keys[:, :, 16:])  # what fills no block is exact
    with pytest.raises(RuntimeError, match="read only"):
        layer.keys.zero_()


def test_few_states_are_handed_out_as_they_are():
    """Nothing is quantised of less than a block."""
    layer = CrossLayer(CacheConfig(**OPTIONS), 0)
    keys, values = states(7)
    layer.update(keys, values)
    assert type(layer.keys) is torch.Tensor
    assert torch.equal(layer.keys, keys)
    assert torch.equal(layer.values, values)


def test_states_can_be_assigned():
    """As to any layer: of the same shape at once, of another once both are there."""
    layer = CrossLayer(CacheConfig(**OPTIONS), 0)
    layer.update(*states())
    layer.keys = states()[0] * 2
    torch.testing.assert_close(layer.keys.dequantize(), states()[0] * 2, atol=0.04, rtol=0)
    layer.keys, layer.values = states(40)
    assert len(layer) == 40
    with pytest.raises(StatesError):
        layer.values = 3


# ------------------------------------------------------------------------------------------------ other changes


def test_rows_are_kept_in_both_parts(used):
    """transformers' own class refuses that for any cache but its own."""
    cache, _ = used
    before = [layer.keys.clone() for layer in cache.self_attention_cache.layers]
    crossed = [layer.keys.dequantize() for layer in cache.cross_attention_cache.layers]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    for old, layer in zip(before, cache.self_attention_cache.layers, strict=True):
        assert torch.equal(layer.keys, old[[1, 0]])
    for old, layer in zip(crossed, cache.cross_attention_cache.layers, strict=True):
        assert torch.equal(layer.keys.dequantize(), old[[1, 0]])
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.cross_attention_cache.layers[1].keys.dequantize(), crossed[1])


def test_a_crop_is_of_the_decoder_s_tokens(used):
    """The encoder's states stay; more than there is is refused, by all layers or none."""
    cache, _ = used
    cache.crop(-3)
    assert cache.get_seq_length() == 21
    assert {len(layer) for layer in cache.cross_attention_cache.layers} == {ENCODED}
    with pytest.raises(CropError):
        cache.crop(-22)
    assert cache.get_seq_length() == 21


def test_a_pass_that_failed_half_way_can_be_taken_back(used):
    """In the decoder's layers; those of the encoder's states are whole or not updated."""
    cache, _ = used
    cache.self_attention_cache.layers[0].update(*states(2))
    assert cache.align_layers() == 2
    assert [len(layer) for layer in cache.self_attention_cache.layers] == [24, 24]


def test_it_can_be_used_again(bart, used):
    """After a reset the next encoder's states are taken."""
    cache, tokens = used
    assert cache.batch_size == 2
    cache.reset()
    assert not any(cache.is_updated.values())
    assert torch.equal(generate(bart, cache), tokens)


def test_a_copy_is_a_cache_of_its_own(used):
    """Both parts, and which layers have the encoder's states."""
    cache, _ = used
    other = copy.deepcopy(cache)
    assert other.is_updated == {0: True, 1: True}
    cache.crop(-5)
    cache.cross_attention_cache.reset()
    assert other.get_seq_length() == 24
    assert len(other.cross_attention_cache.layers[0]) == ENCODED


# ------------------------------------------------------------------------------------------------ figures, options


def test_figures_are_of_both_parts(used):
    """Layer by layer, the decoder's first; bits are those stored of all quantised numbers."""
    cache, _ = used
    own, cross = cache.self_attention_cache, cache.cross_attention_cache
    report = cache.memory_report()
    assert cache.nbytes == own.nbytes + cross.nbytes == report.nbytes
    assert report.layers == own.memory_report().layers + cross.memory_report().layers
    assert report.attention == own.memory_report().attention
    assert (
        own.bits_per_element == cross.bits_per_element == cache.bits_per_element == 12
    )  # 8, and scales of groups of 8
    assert repr(cache).startswith("QuantizedEncoderDecoderCache(decoder: QuantizedCache(backend='reference', nbits=8")
    assert "2 layers, 24 tokens, 16 quantised" in repr(cache)
    assert "encoder's states: QuantizedCache(" in repr(cache)
    assert f"{ENCODED} tokens, {ENCODED} quantised" in repr(cache)


def test_it_is_made_from_presets_configs_and_files(bart, tmp_path):
    """As a `QuantizedCache` is."""
    config = bart[0].config
    preset = QuantizedEncoderDecoderCache.from_preset("kivi-2", config, group_size=8)
    assert preset.config == CacheConfig.from_preset("kivi-2", group_size=8)
    file = tmp_path / "options.json"
    file.write_text(preset.config.to_json())
    assert QuantizedEncoderDecoderCache.from_config(file, config).config == preset.config
    assert QuantizedEncoderDecoderCache.from_config({"nbits": 2}, config).config.nbits == 2
    assert QuantizedEncoderDecoderCache.from_config(preset.config, config).config is preset.config
    with pytest.raises(OptionValueError, match="nbits=7"):
        QuantizedEncoderDecoderCache(nbits=7)
    with pytest.raises(UnsupportedError, match="group_size=12 does not divide head_dim=16"):
        QuantizedEncoderDecoderCache(group_size=12, config=config)


# ------------------------------------------------------------------------------------------------ refused


def test_one_cache_for_both_is_refused_by_the_config(bart):
    """Models would mix up the two parts, with transformers' own caches without a word."""
    with pytest.raises(UnsupportedError, match=r"bart models: it is an encoder-decoder.*QuantizedEncoderDecoderCache"):
        QuantizedCache(config=bart[0].config)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_one_cache_for_both_is_refused_where_it_shows(models, name):
    """Without a config it shows when the second layer comes, after two updates of the first."""
    model, inputs = models[name]
    with pytest.raises(UnsupportedError, match="layer 0 was updated more than once before the next layer"):
        model.generate(inputs["input_ids"], past_key_values=QuantizedCache(**OPTIONS), max_new_tokens=4)


def test_models_without_an_encoder_are_refused():
    """They would never ask for the second part."""
    with pytest.raises(UnsupportedError, match=r"llama models: it has no encoder.*use kvquant.QuantizedCache"):
        QuantizedEncoderDecoderCache(config=LlamaConfig())


def test_models_that_put_another_cache_in_its_place_are_refused():
    """T5Gemma makes the second part anew, from its class alone."""
    config = BartConfig(**BART)
    config.model_type = "t5gemma"
    with pytest.raises(UnsupportedError, match=r"t5gemma models: its generate.. makes the cache"):
        QuantizedEncoderDecoderCache(config=config)


def test_a_decoder_of_such_a_model_that_stands_alone_takes_a_quantised_cache():
    """Its config says so."""
    torch.manual_seed(0)
    model = made(BartForCausalLM(BartConfig(**BART)))
    ids = torch.randint(5, 128, (1, 40))
    cache = QuantizedCache(config=model.config, **OPTIONS)
    tokens = model.generate(ids, past_key_values=cache, max_new_tokens=4, min_new_tokens=4)
    assert cache.memory_report().layers[0].quantized_tokens == 32
    expected = model.generate(
        ids, past_key_values=DynamicCache(config=model.config), max_new_tokens=4, min_new_tokens=4
    )
    assert torch.equal(tokens, expected)

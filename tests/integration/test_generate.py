"""Generation with transformers' own `generate`: with nothing quantised yet, and with the body in use."""

import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
    pipeline,
)

from kvquant import QuantizedCache
from kvquant.attention.counters import counters

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, head_dim=16),
    "mistral": MistralConfig(**SHAPE, head_dim=16, sliding_window=None),
    "mistral sliding": MistralConfig(**SHAPE, head_dim=16, sliding_window=24),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "phi3": Phi3Config(**SHAPE, sliding_window=None),
}
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam search": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "several returned": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    """A tiny random-weight model of each family."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


def inputs(padded):
    """Two prompts of 40 tokens, the second left-padded if asked for."""
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :15], mask[1, :15] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, cache, padded=True, tokens=12, **mode):
    torch.manual_seed(7)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, **mode}
    return model.generate(
        **inputs(padded), past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_with_everything_in_the_window_tokens_are_those_of_the_dynamic_cache(model, attention, mode):
    """Left-padded batches, beams and sampling, to the token and to the last bit of the logits."""
    model.set_attn_implementation(attention)
    mine = generate(model, QuantizedCache(config=model.config, residual_length=1000), **MODES[mode])
    theirs = generate(model, DynamicCache(config=model.config), **MODES[mode])
    assert torch.equal(mine.sequences, theirs.sequences)
    torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [True, False])
def test_with_the_body_in_use_sdpa_decodes_fused(model, mode, padded):
    """Every decode step of every quantised layer reads packed codes; nothing is materialised."""
    model.set_attn_implementation("sdpa")
    cache = QuantizedCache(config=model.config, nbits=8, group_size=16, residual_length=16)
    counters.reset()
    out = generate(model, cache, padded, **MODES[mode])
    quantised = sum(layer.tokens > 0 and layer.quantized_tokens > 0 for layer in cache.memory_report().layers)
    assert (counters.fused, counters.materialised) == (11 * quantised, 0)
    assert out.sequences.shape[1] == 52
    assert quantised == (
        0 if model.config.get_text_config().model_type == "mistral" and model.config.sliding_window else 2
    )


def test_sdpa_and_eager_see_the_same_quantised_cache(model):
    """Fused in tiles or dequantised whole: the same tokens."""
    sequences = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        cache = QuantizedCache(config=model.config, nbits=4, group_size=16, residual_length=16)
        sequences.append(generate(model, cache, do_sample=False).sequences)
    assert torch.equal(*sequences)


def test_a_conversation_goes_on_with_the_same_cache(model):
    """The second turn prefills several tokens over a quantised body, without materialising it."""
    model.set_attn_implementation("sdpa")
    cache = QuantizedCache(config=model.config, nbits=8, group_size=16, residual_length=16)
    first = generate(model, cache, padded=False, do_sample=False).sequences
    prompt = torch.cat([first, torch.randint(3, 300, (2, 20))], dim=1)
    counters.reset()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=5)
    assert counters.materialised == 0
    assert out.shape[1] > prompt.shape[1]
    assert cache.get_seq_length() == out.shape[1] - 1


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi3"])
def test_assisted_decoding_with_prompt_lookup_equals_greedy(family):
    """Rejected tokens are cropped; with everything in the window the text is that of plain greedy decoding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    ids = inputs(padded=False)["input_ids"][:1]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False}
    plain = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    cache = QuantizedCache(config=model.config, residual_length=1000)
    assisted = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(plain, assisted)


def test_chunked_prefill_fills_the_cache(model):
    """`prefill_chunk_size` splits the prompt; later chunks attend over the quantised body in tiles."""
    model.set_attn_implementation("sdpa")
    cache = QuantizedCache(config=model.config, nbits=8, group_size=8, residual_length=8)
    counters.reset()
    generate(model, cache, padded=False, do_sample=False, prefill_chunk_size=16)
    assert cache.get_seq_length() == 51
    assert counters.materialised == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_generate(dtype):
    """The whole path in the dtype that people run."""
    torch.manual_seed(0)
    half = AutoModelForCausalLM.from_config(CONFIGS["llama"]).to(dtype).eval()
    cache = QuantizedCache(config=half.config, nbits=8, group_size=16, residual_length=16)
    out = generate(half, cache, do_sample=False)
    assert out.sequences.shape == (2, 52)
    assert cache.layers[0].keys.dtype == dtype


def test_a_pipeline_takes_the_cache(tmp_path):
    """`pipeline("text-generation")` hands it through to generate."""
    from kvquant.demo import MODEL_DIR

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline warns about its own defaults
        run = pipeline("text-generation", model=str(MODEL_DIR), device="cpu")
        cache = QuantizedCache(nbits=4, residual_length=16)
        text = run("The function returns the", past_key_values=cache, max_new_tokens=40, do_sample=False)
    assert len(text[0]["generated_text"]) > 30
    assert cache.get_seq_length() > 40

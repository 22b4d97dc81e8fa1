"""`torch.compile` of whole models with caches of fixed size: one graph, the eager tokens, and no recompilation."""

import copy
import inspect
import shutil

import pytest
import torch
from torch._dynamo.utils import counters as dynamo
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    CompileConfig,
    Gemma2Config,
    GenerationMixin,
    GptOssConfig,
    LlamaConfig,
)

import kvquant.integrations.transformers as integration
from kvquant import QuantizedCache, QuantizedEncoderDecoderCache
from kvquant.attention.counters import counters
from kvquant.errors import CacheFullError, GraphGradientError, OutOfStepError, QuantizationError, UnsupportedError
from tests.support import SMALL_MODEL, MinMax

ROOM, PROMPT, STEPS = 64, 20, 36
OPTIONS = {"nbits": 4, "group_size": 8, "residual_length": 8, "sink_length": 2}
ONE = {**SMALL_MODEL, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
CONFIGS = {
    "grouped queries": LlamaConfig(**SMALL_MODEL),
    "soft-capping": Gemma2Config(**ONE, attn_logit_softcapping=0.5),
    "sinks": GptOssConfig(**ONE, num_local_experts=2, num_experts_per_tok=1),
}


@pytest.fixture(scope="module", autouse=True)
def own_graphs():
    """The graphs of these tests are made here, and go when they are done."""
    torch._dynamo.reset()
    integration.install()
    # transformers wraps the forward passes of all models in one function, and torch counts what it compiles of one.
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    integration.uninstall()
    torch._dynamo.reset()


def small_model(kind, attention="sdpa"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=attention).eval()


def compiled(model, backend="aot_eager"):
    return torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend)


@pytest.fixture(scope="module")
def llama():
    """The plainest of them."""
    return small_model("grouped queries")


@pytest.fixture(scope="module")
def step(llama):
    """Its forward pass, compiled once for all tests, which ask that it is not compiled again."""
    return compiled(llama)


def fixed(model, **options):
    return QuantizedCache(config=model.config, max_cache_len=ROOM, **{**OPTIONS, **options})


def prompt(tokens=PROMPT, batch=2):
    return torch.randint(2, 128, (batch, tokens), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def decode(model, cache, steps=STEPS, step=None, prefill=None):
    """Prefill and decode greedily; return the tokens and all scores."""
    scores = [(prefill or model.forward)(prompt(), past_key_values=cache).logits[:, -1]]
    for _ in range(steps):
        scores.append(decode_one(step or model.forward, cache, scores[-1].argmax(1, keepdim=True))[:, -1])
    stacked = torch.stack(scores, 1)
    return stacked.argmax(2), stacked


@torch.inference_mode()
def decode_one(step, cache, ids=None):
    return step(prompt(1) if ids is None else ids, past_key_values=cache).logits


def graphs():
    return dynamo["stats"].get("unique_graphs", 0)


def assert_alike(one, two):
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("kind", ["grouped queries", "sinks"])
def test_a_compiled_step_gives_the_eager_tokens_in_one_graph_for_all_caches(kind, llama, step):
    """While blocks leave the window, and with another cache: no step after the first compiles anything."""
    plain = kind == "grouped queries"
    model = llama if plain else small_model(kind, "kvquant")
    forward = step if plain else compiled(model, "eager")
    tokens, scores = decode(model, QuantizedCache(config=model.config, **OPTIONS))
    eager = decode(model, fixed(model))
    before = graphs()
    try:
        for _ in range(2):
            cache = fixed(model)
            got = decode(model, cache, step=forward)
            assert torch.equal(got[0], tokens)
            assert_alike(got[1], eager[1])
            assert_alike(got[1], scores)
            assert {len(layer.stores[0].body) for layer in cache.layers} == {40}  # 8 after the prefill
            torch.compiler.set_stance("fail_on_recompile")
    finally:
        torch.compiler.set_stance("default")
    assert graphs() == before + 1
    assert not dynamo["graph_break"]


def test_the_prefill_can_be_compiled_too(llama, step):
    """Whether the layers get to know their states inside of the graph, or were initialised before."""
    expected, _ = decode(llama, fixed(llama))
    decode_one(step, fixed(llama))
    before = graphs()
    for early in (False, True):
        cache = fixed(llama)
        if early:
            cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
        assert cache.is_initialized == early
        tokens, _ = decode(llama, cache, step=step, prefill=step)
        assert torch.equal(tokens, expected)
        assert graphs() == before + 1  # for as many tokens as the prompt has


def test_a_compiled_prefill_needs_the_layers_of_a_config(llama):
    """The error says what to do."""
    cache = QuantizedCache(max_cache_len=ROOM, **OPTIONS)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"first update; make it with config=model\.config"):
        compiled(llama, "eager")(prompt(), past_key_values=cache)
    with pytest.raises(UnsupportedError, match=r"it has no layers .* make it with config=model\.config"):
        cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))


#: What inductor needs and `make test` cannot install: a fresh machine need not have it, and CI has.
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))


@pytest.mark.parametrize(
    ("kind", "attention", "backend"),
    [
        ("soft-capping", "kvquant", "aot_eager"),
        ("grouped queries", "eager", "aot_eager"),  # which reads the numbers
        pytest.param(
            "grouped queries",
            "sdpa",
            "inductor",
            marks=pytest.mark.skipif(
                not HAS_COMPILER, reason="needs a C++ compiler on the PATH, for inductor: c++, g++ or clang++"
            ),
        ),
    ],
)
def test_a_layer_s_attention_in_a_graph(kind, attention, backend):
    """By every way that leads to the packed tokens, and with code that is compiled for this processor."""
    model = small_model(kind, attention)
    layer, position = model.model.layers[0].self_attn, (torch.ones(2, 1, 16), torch.ones(2, 1, 16))
    states, before = torch.randn(30, 2, 1, 64), graphs()
    caches = fixed(model), fixed(model)
    graph = torch.compile(layer.forward, fullgraph=True, backend=backend)
    with torch.inference_mode():
        for at, now in enumerate(states):
            shown = (torch.arange(ROOM) <= at)[None, None, None].expand(2, 1, 1, ROOM)
            if attention == "eager":
                shown = torch.zeros(2, 1, 1, ROOM).masked_fill(~shown, torch.finfo(torch.float32).min)
            given = {"position_embeddings": position, "attention_mask": shown.contiguous()}
            one, two = (
                forward(now, **given, past_key_values=cache)[0]
                for forward, cache in zip((layer.forward, graph), caches, strict=True)
            )
            assert_alike(two, one)
    assert len(caches[1].layers[0].stores[0].body) == 16
    assert graphs() == before + 1


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler on the PATH, for inductor: c++, g++ or clang++")
def test_what_a_graph_reads_of_the_length_is_what_it_was_there():
    """Before an update that is the length before it, also where inductor computes with it after."""
    weight, positions = torch.randn(16, 16, requires_grad=True), torch.arange(ROOM)

    def step(layer, states):
        before = positions <= layer.get_seq_length()
        states = states @ weight
        keys, values = layer.update(states, states)
        seen = torch.nn.functional.scaled_dot_product_attention(states, keys, values)
        return seen, torch.where(before, 1.0, 0.0).sum() + (states * 0).sum()

    graph, layer = torch.compile(step, fullgraph=True), fixed(small_model("grouped queries")).layers[0]
    for length in range(3):
        assert int(graph(layer, torch.randn(2, 2, 1, 16))[1]) == length + 1


def test_a_compiled_step_works_where_gradients_are_on_and_has_none():
    """A backward pass would give wrong ones, and is an error."""
    model = small_model("grouped queries")
    layer, position = model.model.layers[0].self_attn, (torch.ones(2, 1, 16), torch.ones(2, 1, 16))
    given = torch.randn(2, 1, 64), position, torch.ones(2, 1, 1, ROOM, dtype=torch.bool)
    out, _ = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")(*given, fixed(model))
    assert_alike(out, layer(*given, fixed(model))[0])
    with pytest.raises(GraphGradientError, match="no gradients through the cache"):
        out.sum().backward()


# ------------------------------------------------------------------------------------------------ generate


def everywhere():
    """The config of transformers' own compilation, on the CPU too."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return config


#: Older versions of transformers compile no assisted decoding.
COMPILES_CANDIDATES = "get_compiled_call" in inspect.getsource(GenerationMixin._assisted_decoding)


@pytest.mark.parametrize(
    ("options", "has_graph"),
    [
        ({"do_sample": False}, True),
        ({"do_sample": True}, True),
        ({"do_sample": False, "num_beams": 2}, False),  # transformers compiles no beam search
        ({"do_sample": False, "prefill_chunk_size": 10}, True),
        ({"do_sample": False, "prompt_lookup_num_tokens": 3}, COMPILES_CANDIDATES),
    ],
    ids=["greedy", "sampling", "beam search", "chunked prefill", "prompt lookup"],
)
def test_transformers_own_compilation_gives_the_tokens_of_the_dynamic_cache(options, has_graph):
    """Left-padded, in every mode; with a config, and without one, where the prefill makes the layers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL_MODEL, "num_hidden_layers": 1})).eval()
    ids = prompt(batch=1 if "prompt_lookup_num_tokens" in options else 2)
    shown = torch.ones_like(ids)
    shown[0, :3] = 0

    def generate(cache, **more):
        torch.manual_seed(7)
        return model.generate(ids, attention_mask=shown, max_new_tokens=30, past_key_values=cache, **options, **more)

    tokens = generate(QuantizedCache(config=model.config, **OPTIONS))
    for config in (model.config, None) if options == {"do_sample": False} else (model.config,):
        cache = QuantizedCache(config=config, max_cache_len=ROOM, **OPTIONS)
        assert torch.equal(generate(cache, compile_config=everywhere()), tokens)
    assert hasattr(model, "_compiled_call") == has_graph
    assert not dynamo["graph_break"]


def test_an_encoder_s_states_are_read_in_a_graph():
    """Encoder-decoder models are compiled with both of their caches."""
    torch.manual_seed(0)
    shape = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": ROOM}
    ends = {"eos_token_id": None, "forced_eos_token_id": None, "decoder_start_token_id": 0, "pad_token_id": 1}
    model = BartForConditionalGeneration(BartConfig(vocab_size=128, **shape, **heads, **ends)).eval()
    before = graphs()
    caches = [QuantizedEncoderDecoderCache(config=model.config, max_cache_len=ROOM, **OPTIONS) for _ in range(2)]
    tokens, eager, graph = (
        model.generate(prompt(40), max_new_tokens=30, do_sample=False, past_key_values=cache, **options)
        for cache, options in (
            (QuantizedEncoderDecoderCache(config=model.config, **OPTIONS), {}),
            (caches[0], {}),
            (caches[1], {"compile_config": everywhere()}),
        )
    )
    assert torch.equal(eager, tokens)
    assert torch.equal(graph, tokens)
    assert caches[1].is_compileable
    assert len(caches[1].cross_attention_cache.layers[0].stores[0].body) == 32
    assert graphs() == before + 1


# ------------------------------------------------------------------------------------------------ between steps


def test_a_graph_goes_on_after_every_change_of_the_cache(llama, step, tmp_path):
    """Copied, cropped, reordered, saved and loaded, emptied: its count of tokens is never out of step."""
    cache, other = fixed(llama), QuantizedCache(config=llama.config, **OPTIONS)
    for one, forward in ((cache, step), (other, llama.forward)):
        decode(llama, one, steps=12, step=forward)

    def both(one, two):
        assert_alike(decode_one(step, one), decode_one(llama.forward, two))

    before = graphs()
    copied = copy.deepcopy(cache)
    both(copied, copy.deepcopy(other))
    for change in (
        lambda one: one.crop(-3),
        lambda one: one.crop(-15),  # into the body
        lambda one: one.reorder_cache(torch.tensor([1, 0])),
    ):
        change(cache)
        change(other)
        both(cache, other)
    assert copied.get_seq_length() == PROMPT + 13  # a copy is on its own
    cache.save(tmp_path / "cache.kvq", model=llama)
    both(QuantizedCache.load(tmp_path / "cache.kvq", model=llama), copy.deepcopy(other))
    for one in (cache, other):
        one.reset()
        decode(llama, one, steps=2)
    both(cache, other)
    for one in (cache, other):
        one.batch_select_indices(torch.tensor([0]))
        decode_one(llama.forward, one, prompt(1, 1))
        one.batch_repeat_interleave(2)
    both(cache, other)
    assert graphs() == before


def test_a_full_cache_says_so_from_within_a_graph_and_holds_what_it_held(llama, step):
    """And can go on once tokens have been removed."""
    cache = fixed(llama)
    decode(llama, cache, steps=ROOM - PROMPT, step=step)
    keys, report = cache.layers[0].keys, cache.memory_report()
    with pytest.raises(CacheFullError, match="max_cache_len=64 leaves no room for 1 more tokens beside the 64"):
        decode_one(step, cache)
    assert cache.memory_report() == report
    assert torch.equal(cache.layers[0].keys, keys)
    cache.crop(-1)
    decode_one(step, cache)
    assert cache.get_seq_length() == ROOM


def test_a_compiled_step_attends_over_packed_tokens(llama, step):
    """Nothing is dequantised whole."""
    cache = fixed(llama)
    decode(llama, cache, steps=8, step=step)
    counters.reset()
    decode_one(step, cache)
    assert (counters.fused, counters.materialised) == (2, 0)


class FailsOnce(MinMax):
    """Fails where it is told to."""

    fails = False

    def quantize(self, rows):
        if FailsOnce.fails:
            raise ValueError("now")
        return super().quantize(rows)


def test_a_step_that_failed_half_way_is_not_gone_on_from_unnoticed(llama, step, backend):
    """Layers before the one that failed hold the tokens of the step; `align_layers` takes them back."""
    cache = fixed(llama, backend=backend(FailsOnce), layers={0: {"residual_length": 100}})
    before = graphs()
    decode(llama, cache, steps=5, step=step)
    assert graphs() == before  # other options make no other graph
    FailsOnce.fails = True
    with pytest.raises(QuantizationError, match="now"):
        decode_one(step, cache)
    FailsOnce.fails = False
    length = cache.layers[1].get_seq_length()
    with pytest.raises(OutOfStepError, match=r"layer 0 holds 27 tokens where .* 26: .* cache\.align_layers"):
        decode_one(step, cache)
    cache.align_layers()
    other = copy.deepcopy(cache)
    assert_alike(decode_one(step, cache), decode_one(llama.forward, other))
    assert [layer.get_seq_length() for layer in cache.layers] == [length + 1] * 2

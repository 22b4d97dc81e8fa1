"""Teacher forcing: many tokens at once give what one token at a time gives."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from kvquant.cache.cache import QuantizedCache
from kvquant.engine.pages import CanonicalPage
from kvquant.evaluation import teacher
from kvquant.evaluation.candidates import held_states, is_quantized, parse_candidates
from kvquant.evaluation.loading import load_model
from kvquant.evaluation.teacher import Prefill, alike, forced_logits, one_pass_logits
from tests.support import SMALL_MODEL


@functools.cache
def small(dtype=torch.float64, sliding_window=None):
    torch.manual_seed(0)
    plain = LlamaConfig(**SMALL_MODEL)
    config = MistralConfig(**SMALL_MODEL, sliding_window=sliding_window) if sliding_window else plain
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for layer in model.model.layers:  # random weights attend to everything alike: make them choose
        layer.self_attn.q_proj.weight.data.mul_(8)
        layer.self_attn.k_proj.weight.data.mul_(8)
    return model


def text(tokens, vocabulary=SMALL_MODEL["vocab_size"]):
    return torch.randint(2, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(1))


def fed(model, cache, ids, prefill, **options):
    """Logits after each token from the last of the prefill on, and the passes that they came in."""
    chunks = list(forced_logits(model, cache, ids, prefill, **options))
    return torch.cat(chunks), [len(chunk) for chunk in chunks[1:]]


def stored(cache, index=None):
    """Return all that the bodies of a cache, or of one layer, hold: codes, scales and offsets of its valid tokens."""
    layers = cache.layers if index is None else [cache.layers[index]]
    pages = [page for layer in layers for store in layer.stores for page in store.body.pages]
    assert all(isinstance(page, CanonicalPage) for page in pages)
    found = []
    for page in pages:
        per = page.scheme.group_size if page.scheme.axis == "channel" else 1
        found.append(page.codes[:, :, : page.length])
        found += [grid[:, :, : page.length // per] for grid in (page.scale, page.offset) if grid is not None]
    return found


CACHES = (
    "reference:8",
    "reference:2",
    "reference:4:group_size=16:residual_length=0",
    "reference:3:axis_key=token:axis_value=channel:group_size=16:residual_length=20:sink_length=5",
    "reference:1:token:group_size=8:residual_length=7",
    "reference:2:axis_key=channel:group_size_key=8:group_size_value=16:axis_value=channel:sink_length=40",
    "reference:2:rotation_key=hadamard:group_size=16:residual_length=16",
    "kivi-2:group_size=16:group_size_value=8:residual_length=32",
)


@pytest.mark.parametrize("written", CACHES)
def test_many_tokens_at_once_are_the_same_as_one_at_a_time(written):
    """Proven where rounding cannot hide anything: in float64 the same codes, bit by bit, and the same expectations.

    The rest is rounding: a product over many tokens adds up in another order than one over one token.
    """
    model, ids = small(), text(200)
    (_, candidate) = parse_candidates(written)
    slow, quick = candidate.make(model.config), candidate.make(model.config)
    one_by_one, single = fed(model, slow, ids, 50, one_by_one=True)
    at_once, passes = fed(model, quick, ids, 50)
    assert single == [1] * 150
    assert len(passes) <= 150 / 4
    assert sum(len(layer.stores[0].body) for layer in slow.layers) > 0
    for one, other in zip(stored(slow), stored(quick), strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "written", ["hqq:2:residual_length=10", "quanto:8:residual_length=30:qtype=qfloat8_e4m3fn", "hqq:8", "quanto:2"]
)
def test_the_same_for_libraries_that_compute_in_float32(written):
    """What the first layer quantises does not depend on attention: the same codes. Behind it rounding tips a few."""
    model, ids = small(), text(200)
    plain = {"smoothing_key": False, "smoothing_value": False, "scale_bits": 16}  # smoothing sees what rounding tips
    full, candidate = parse_candidates(f"{written}:compute_dtype=float32", {"group_size": 16, **plain})
    slow, quick = candidate.make(model.config), candidate.make(model.config)
    one_by_one, _ = fed(model, slow, ids, 50, one_by_one=True)
    at_once, _ = fed(model, quick, ids, 50)
    held = [list(zip(stored(slow, layer), stored(quick, layer), strict=True)) for layer in range(2)]
    assert all(torch.equal(one, other) for one, other in held[0])
    apart = sum(int((one != other).sum()) for one, other in held[1])
    assert apart <= 0.02 * sum(one.numel() for one, _ in held[1])
    exact, _ = fed(model, full.make(model.config), ids, 50)
    assert (one_by_one - at_once).abs().mean() < 0.05 * (one_by_one - exact).abs().mean()


@pytest.mark.parametrize(
    "written",
    ["quanto:4", "quanto:2:group_size=32:residual_length=40", "hqq:4:group_size=32:residual_length=25", "fp8"],
)
def test_the_same_for_the_caches_of_transformers(written):
    """They flush after attention, and quantise again what they had quantised before."""
    dtype = torch.float32 if written == "fp8" else torch.float64
    model, ids = small(dtype), text(200)
    (_, candidate) = parse_candidates(f"transformers:{written}")
    slow, quick = candidate.make(model.config), candidate.make(model.config)
    one_by_one, _ = fed(model, slow, ids, 50, one_by_one=True)
    at_once, passes = fed(model, quick, ids, 50)
    assert len(passes) <= 150 / 4
    tolerance = 2e-3 if written == "fp8" else 1e-6
    torch.testing.assert_close(one_by_one, at_once, rtol=tolerance, atol=tolerance)
    for one, other in zip(slow.layers, quick.layers, strict=True):
        for held, also in zip(held_states(one), held_states(other), strict=True):
            torch.testing.assert_close(held, also, rtol=tolerance, atol=tolerance)


@settings(max_examples=25)
@given(
    prefill=st.integers(1, 90),
    group=st.sampled_from([4, 8, 16]),
    residual=st.integers(0, 40),
    sink=st.integers(0, 30),
    axes=st.tuples(*[st.sampled_from(["channel", "token"])] * 2),
    other=st.sampled_from([{}, {"residual_length": 3}, {"group_size": 16, "axis_key": "channel"}, {"sink_length": 9}]),
)
def test_whatever_the_window_and_the_layers(prefill, group, residual, sink, axes, other):
    """Any prefill, window, sink and group, and layers that differ: the codes are the same."""
    model, ids = small(), text(110)
    options = {"group_size": group, "residual_length": residual, "sink_length": sink, "nbits": 2}
    options |= {"axis_key": axes[0], "axis_value": axes[1], "layers": {1: other}}
    slow, quick = (QuantizedCache("reference", model.config, **options) for _ in range(2))
    one_by_one, _ = fed(model, slow, ids, prefill, one_by_one=True)
    at_once, _ = fed(model, quick, ids, prefill)
    for one, also in zip(stored(slow), stored(quick), strict=True):
        assert torch.equal(one, also)
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-11, atol=1e-11)


def test_a_token_more_than_that_would_be_something_else():
    """`alike` gives as many as there can be: one more would be quantised before the first of them is attended to."""
    model, ids = small(), text(120)
    options = {"nbits": 1, "group_size": 16, "residual_length": 0}
    cache, single = (QuantizedCache("reference", model.config, **options) for _ in range(2))
    expected, _ = fed(model, single, ids, 40, one_by_one=True)
    next(forced_logits(model, cache, ids[:, :40], 40))
    count = alike(cache, 80)
    assert count == 7  # 40 tokens: two blocks of 16 and 8 in the window; the 8th from here completes a block
    with torch.no_grad():
        logits = model(ids[:, 40 : 40 + count + 1], past_key_values=cache, use_cache=True).logits[0]
    assert (logits - expected[1 : 2 + count]).abs().max() > 1e-3
    at_once, _ = fed(model, QuantizedCache("reference", model.config, **options), ids, 40)
    assert (at_once - expected).abs().max() < 1e-11


def test_float32_differs_by_rounding_alone():
    """On the shipped model: expectations by a hundred-thousandth, save where a number lay between two codes."""
    loaded = load_model()
    ids = torch.tensor([loaded.encode("The server reads its configuration from a file, one line at a time. " * 20)])
    _, candidate = parse_candidates("reference:4:residual_length=32")
    slow, quick = candidate.make(loaded.model.config), candidate.make(loaded.model.config)
    one_by_one, _ = fed(loaded.model, slow, ids, 64, one_by_one=True)
    at_once, _ = fed(loaded.model, quick, ids, 64)
    apart = sum(int((one != also).sum()) for one, also in zip(stored(slow), stored(quick), strict=True))
    assert apart / sum(part.numel() for part in stored(slow)) < 1e-4
    difference = (one_by_one - at_once).abs().amax(dim=1) / one_by_one.abs().amax()
    assert difference.median() < 1e-5


#: A cache that quantises windows of 100 tokens.
SLIDING = "reference:3:residual_length=20:group_size_key=16"


def test_a_quantised_window_sees_the_same_however_its_tokens_come():
    """What comes out of view with the tokens before is not seen with those that come at once."""
    model, ids = small(sliding_window=100), text(300)
    candidate = parse_candidates(SLIDING, {"group_size": 16})[1]
    slow, quick = candidate.make(model.config), candidate.make(model.config)
    assert is_quantized(slow.layers[0])
    one_by_one, _ = fed(model, slow, ids, 150, one_by_one=True)
    at_once, passes = fed(model, quick, ids, 150)
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-9, atol=1e-9)
    assert len(passes) < 50


def test_sliding_windows_and_memory_bound():
    """Layers that transformers keeps itself take any number of tokens; no pass has more than the bound."""
    model, ids = small(sliding_window=24), text(200)
    _, candidate = parse_candidates("reference:2:group_size=16")
    slow, quick = candidate.make(model.config), candidate.make(model.config)
    one_by_one, _ = fed(model, slow, ids, 30, one_by_one=True)
    at_once, passes = fed(model, quick, ids, 30)
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-11, atol=1e-11)
    assert passes == [teacher.MOST_AT_ONCE, 170 - teacher.MOST_AT_ONCE]


@pytest.mark.parametrize(
    ("written", "sliding_window"),
    [*((written, None) for written in CACHES[:4]), ("hqq:2", None), ("reference:2", 24), ("full", 24), (SLIDING, 100)]
    + [(f"transformers:{written}", None) for written in ("quanto:4", "hqq:2", "fp8")],
)
def test_one_prefill_fills_many_caches(written, sliding_window):
    """To the last bit as a pass of their own would: expectations, and what is held."""
    model, ids = small(torch.float32, sliding_window), text(120)
    full, *others = parse_candidates(written, {"group_size": 16})
    (candidate,) = others or [full]
    own, filled = candidate.make(model.config), candidate.make(model.config)
    expected, _ = fed(model, own, ids, 50)
    prefill, passes = Prefill(model, ids[:, :50]), []
    counting = model.register_forward_pre_hook(lambda *_: passes.append(1))
    prefill.into(full.make(model.config))
    found, fed_behind = fed(model, filled, ids, prefill)
    counting.remove()
    assert torch.equal(found, expected)
    assert len(passes) == 1 + len(fed_behind)
    for one, other in zip(own.layers, filled.layers, strict=True):
        for held, also in zip(held_states(one), held_states(other), strict=True):
            assert torch.equal(held, also)


def test_a_cache_that_may_attend_in_its_own_way_gets_a_prefill_of_its_own():
    """A layer of a kind that nobody knows is not filled with what another was handed."""

    class Rounding(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            return super().update(key_states.round(), value_states, *args, **kwargs)

    model, ids = small(torch.float32), text(60)
    prefill = Prefill(model, ids[:, :50])
    exact = prefill.into(DynamicCache(config=model.config))
    rounding = Cache(layers=[Rounding() for _ in range(2)])
    assert not torch.equal(prefill.into(rounding), exact)
    assert torch.equal(rounding.layers[0].keys, rounding.layers[0].keys.round())


def test_layers_that_nobody_knows_get_one_token_at_a_time():
    """Slow is right; so does a cache without any layers yet."""

    class Unknown:
        layers = (object(),)

    class Empty:
        layers = ()

    assert alike(Unknown(), 50) == alike(Empty(), 50) == 1


def test_one_pass_over_quantised_states_is_something_else():
    """It reads what the cache holds at the end: for an exact cache the same, for a quantised one far from it."""
    model, ids = small(), text(150)
    full, candidate = parse_candidates("reference:2:group_size=16:residual_length=32")
    expected, _ = fed(model, full.make(model.config), ids, 50)
    torch.testing.assert_close(
        one_pass_logits(model, full.make(model.config), ids, 50), expected[1:], rtol=1e-11, atol=1e-11
    )
    through, _ = fed(model, candidate.make(model.config), ids, 50)
    cache = candidate.make(model.config)
    shortcut = one_pass_logits(model, cache, ids, 50)
    # Its last token sees what the cache's would: the same body, the same window.
    assert (shortcut - through[1:]).abs().mean() > 0.2 * (through[1:] - expected[1:]).abs().mean()
    # By its definition: every layer attends over the states that it holds at the end, from the first token on.
    keys, values = held_states(cache.layers[0])
    attention = model.model.layers[0].self_attn
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    cos, sin = model.model.rotary_emb(hidden, torch.arange(150)[None])
    query = attention.q_proj(hidden).unflatten(2, (4, 16)).transpose(1, 2)
    turned = torch.cat((-query[..., 8:], query[..., :8]), dim=-1)
    query = query * cos[:, None] + turned * sin[:, None]
    mixed = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    captured = []
    handle = attention.o_proj.register_forward_hook(lambda _, given, __: captured.append(given[0]))
    one_pass_logits(model, candidate.make(model.config), ids, 50)
    handle.remove()
    torch.testing.assert_close(captured[0], mixed.transpose(1, 2).flatten(2), rtol=1e-9, atol=1e-9)

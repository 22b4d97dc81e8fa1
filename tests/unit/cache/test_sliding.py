"""Quantised layers of sliding-window attention, beside layers that forget nothing and beside transformers' own."""

import copy
import os
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import Gemma3TextConfig, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvquant import QuantizedCache
from kvquant.attention.counters import counters
from kvquant.attention.kernels import VARIABLE
from kvquant.cache.describe import describe
from kvquant.cache.header import read_header
from kvquant.cache.layer import QuantizedLayer
from kvquant.cache.sliding import QuantizedSlidingLayer
from kvquant.engine.config import CacheConfig
from kvquant.errors import CacheFileError, CropError, OtherModelError
from tests.support import FORMATS, SMALL_MODEL, whole_width
from tests.unit.cache.files import tampered
from tests.unit.cache.helpers import states

pytestmark = pytest.mark.usefixtures("formats")

WINDOW = 65
OPTIONS = {"group_size": 8, "residual_length": 8, "nbits": 4}


def config(backend="test-affine", **options):
    nbits = whole_width(OPTIONS["nbits"], backend.removeprefix("test-"))
    return CacheConfig(**{"backend": backend, **OPTIONS, "nbits": nbits, **options})


def make(window=WINDOW, **options):
    return QuantizedSlidingLayer(config(**options), 0, window)


def pairs(lengths, seed=0):
    torch.manual_seed(seed)
    return [(states(tokens), states(tokens, width=8)) for tokens in lengths]


def fill(layer, given_):
    return [layer.update(*pair) for pair in given_]


SPLITS = st.lists(st.one_of(st.integers(1, 12), st.integers(0, 300)), min_size=1, max_size=8)


@given(lengths=SPLITS, kind=st.sampled_from(sorted(FORMATS)), sink=st.integers(0, 5), window=st.integers(46, 90))
@settings(max_examples=25, deadline=None)
def test_what_is_in_view_is_what_a_layer_that_forgets_nothing_holds(lengths, kind, sink, window):
    """However the tokens come: blocks begin at the same tokens, and each is quantised as it would have been."""
    options = {"sink_length": sink, "outlier_share": 0.1, "smoothing_key": True, "smoothing_value": True}
    sliding = make(window, backend=f"test-{kind}", **options)
    whole = QuantizedLayer(config(f"test-{kind}", **options), 0)
    theirs = DynamicSlidingWindowLayer(window)
    for pair in pairs(lengths):
        sizes = sliding.get_mask_sizes(pair[0].shape[2])
        assert sizes == theirs.get_mask_sizes(pair[0].shape[2])
        returned, expected = sliding.update(*pair), theirs.update(*pair)
        whole.update(*pair)
        assert [one.shape for one in returned] == [one.shape for one in expected]
        assert len(sliding) == sliding.get_seq_length() == theirs.get_seq_length()
        kept = theirs.keys.shape[2]
        for mine, all_ in ((sliding.keys, whole.keys), (sliding.values, whole.values)):
            assert torch.equal(mine, all_[:, :, all_.shape[2] - kept :])
        if len(whole) != pair[0].shape[2]:  # the first update hands out the states themselves
            for mine, all_ in zip(returned, (whole.keys, whole.values), strict=True):
                assert torch.equal(torch.Tensor.add(mine, 0), all_[:, :, all_.shape[2] - sizes[0] :])


@given(lengths=SPLITS)
@settings(max_examples=15, deadline=None)
def test_what_is_out_of_view_is_given_back_a_page_at_a_time(lengths):
    """So memory is bounded by the window, however long the sequence."""
    layer = make()
    fill(layer, pairs([*lengths, 1]))
    for store in layer.stores:
        assert store.hidden < store.policy.page_tokens + store.policy.sink_length
        assert store.body.held <= WINDOW + max(lengths) + store.policy.page_tokens


def test_a_long_prompt_is_quantised_only_as_far_as_it_is_seen():
    """A token that no query will see again never reaches the backend."""
    layer = make()
    fill(layer, pairs([1000]))
    assert layer.memory().quantized_tokens <= WINDOW
    assert layer.stores[0].body.first_token % 8 == 0


AXES = [("channel", "token"), ("token", "channel")]


# For numba a kind of stream that other tests compile for as well.
@pytest.mark.parametrize(
    ("kernel", "kind", "axes", "queries", "width", "group"),
    [
        ("numba", "affine", ("channel", "token"), 1, 64, 32),
        *((*each, axes, 3, 16, 8) for each in product(("triton", "torch"), ("affine", "trellis")) for axes in AXES),
    ],
)
def test_attention_over_packed_tokens_sees_what_is_in_view(kernel, kind, axes, queries, width, group, monkeypatch):
    """With hidden tokens before, inside a page, and a mask of transformers' width."""
    if kernel != "torch":
        pytest.importorskip(kernel)
    if kernel == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1; tests/gpu runs compiled kernels")
    monkeypatch.setenv(VARIABLE, kernel)
    layer = make(201, backend=f"test-{kind}", group_size=group, axis_key=axes[0], axis_value=axes[1])
    torch.manual_seed(0)
    for tokens in (150, 140, 3, 5):
        layer.update(states(tokens, width=width), states(tokens, width=width))
    keys, values = layer.update(states(queries, width=width), states(queries, width=width))
    assert layer.stores[0].body.hidden > 0
    query = torch.randn(1, 8, queries, width)
    mask = torch.rand(1, 1, queries, keys.shape[2]) > 0.3
    counters.reset()
    mixed = functional.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
    assert (counters.kernels[kernel], counters.materialised) == (1, 0)
    exact = [layer.stores[at].read() for at in (0, 1)]
    expected = functional.scaled_dot_product_attention(query, *exact, mask, enable_gqa=True)
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)


@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=5),
    last=st.integers(1, 60),
    share=st.floats(0, 1),
    kind=st.sampled_from(sorted(FORMATS)),
)
@settings(max_examples=25, deadline=None)
def test_an_update_can_be_taken_back(lengths, last, share, kind):
    """Without asking for it in advance, token for token: what comes into view again is what was stored."""
    layer = make(backend=f"test-{kind}")
    fill(layer, pairs(lengths))
    whole = QuantizedLayer(config(f"test-{kind}"), 0)
    fill(whole, pairs(lengths))
    new = pairs([last], seed=1)[0]
    removed = min(last, round(share * last))
    for one in (layer, whole):
        one.update(*new)
        one.crop(-removed)
    kept = min(len(whole), WINDOW - 1)
    assert len(layer) == len(whole)
    assert torch.equal(layer.keys, whole.keys[:, :, len(whole) - kept :])
    for one in (layer, whole):
        one.update(*pairs([5], seed=2)[0])
    kept = min(len(whole), WINDOW - 1)
    assert torch.equal(layer.values, whole.values[:, :, len(whole) - kept :])


def test_with_the_past_recorded_several_updates_can_be_taken_back():
    """As an assistant's generation needs it; the next crop lets go of what is out of view."""
    layer, whole = make(), QuantizedLayer(config(), 0)
    layer.activate_past_recording()
    for one in (layer, whole):
        fill(one, pairs([100, *[1] * 80]))
        one.crop(-80)
    assert torch.equal(layer.keys, whole.keys[:, :, -WINDOW + 1 :])
    fill(layer, pairs([300], seed=1))
    layer.crop(0)
    assert layer.stores[0].hidden < layer.stores[0].policy.page_tokens


def test_what_is_no_longer_held_cannot_come_into_view_again():
    """It is refused, with the way that works, and nothing changes."""
    layer = make()
    fill(layer, pairs([400, 1, 1]))
    before = layer.keys
    with pytest.raises(CropError, match=r"window of 65 tokens.*activate_past_recording\(\) before"):
        layer.crop(-300)
    assert torch.equal(layer.keys, before)
    assert len(layer) == 402


def test_a_failed_update_changes_nothing(monkeypatch):
    """Neither the first, of a long prompt, nor a later one."""
    layer = make()
    layer.lazy_initialization(*pairs([0])[0])
    store = type(layer.stores[1])

    def fail(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(store, "stage", fail)
        with pytest.raises(MemoryError):
            layer.update(*pairs([300])[0])
    assert (len(layer), layer.stores[0].freed) == (0, 0)
    fill(layer, pairs([300]))
    before = layer.keys
    with monkeypatch.context() as patch:
        patch.setattr(store, "stage", fail)
        with pytest.raises(MemoryError):
            layer.update(*pairs([90])[0])
    assert torch.equal(layer.keys, before)


def test_assigned_states_take_the_place_of_those_in_view():
    """Token for token, exact and quantised in the same places; generation goes on from there."""
    layer = make(nbits=8)
    fill(layer, pairs([90, 7]))
    length, kept = len(layer), layer.keys.shape[2]
    new = torch.randn(1, 2, kept, 16)
    layer.keys = new
    torch.testing.assert_close(layer.keys, new, rtol=0, atol=0.05)
    assert torch.equal(layer.keys[:, :, -8:], new[:, :, -8:])
    assert len(layer) == length
    keys, _ = layer.update(*pairs([1], seed=3)[0])
    assert keys.shape[2] == WINDOW


def test_rows_can_be_chosen_and_copies_are_independent():
    """As in every quantised layer."""
    torch.manual_seed(0)
    layer = make()
    layer.update(states(90, batch=3), states(90, batch=3))
    layer.update(states(9, batch=3), states(9, batch=3))
    before, copied = layer.keys, copy.deepcopy(layer)
    layer.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(layer.keys, before[[2, 0]])
    assert torch.equal(copied.keys, before)
    layer.reset()
    assert len(layer) == 0
    layer.update(states(5), states(5))
    assert layer.keys.shape[2] == 5


def test_windows_are_quantised_where_it_pays():
    """A window that is hardly longer than what stays exact keeps transformers' own layer."""

    def layers(window, **options):
        model = MistralConfig(**SMALL_MODEL, sliding_window=window)
        return {type(layer) for layer in QuantizedCache(config=model, nbits=4, **options).layers}

    assert layers(384) == {DynamicSlidingWindowLayer}  # 128 exact and 4 blocks of 64, less the token to come
    assert layers(385) == {QuantizedSlidingLayer}
    assert layers(384, residual_length=64) == {QuantizedSlidingLayer}
    assert layers(385, sink_length=4) == {DynamicSlidingWindowLayer}


# ------------------------------------------------------------------------------------------------ saved and loaded


def gemma(window=80):
    kinds = ["sliding_attention", "full_attention"]
    sizes = {"num_hidden_layers": 2, "head_dim": 16, "num_key_value_heads": 2}
    return Gemma3TextConfig(**sizes, sliding_window=window, layer_types=kinds)


def filled(lengths, kind="affine", window=80, sink=0):
    options = {**OPTIONS, "nbits": whole_width(OPTIONS["nbits"], kind), "sink_length": sink, "outlier_share": 0.1}
    cache = QuantizedCache(f"test-{kind}", gemma(window), **options)
    for pair in pairs(lengths):
        for layer in (0, 1):
            cache.update(*pair, layer)
    return cache


@pytest.mark.parametrize("kind", sorted(FORMATS))
@pytest.mark.parametrize("lengths", [(30,), (60, 30, 5), (300,), (300, *[1] * 9), (200, 100, 60)])
@pytest.mark.parametrize("sink", [0, 3])
def test_a_loaded_layer_goes_on_as_if_it_had_never_been_saved(tmp_path, kind, lengths, sink):
    """With nothing quantised yet, with tokens out of view, and with some gone."""
    cache = filled(lengths, kind, sink=sink)
    cache.save(tmp_path / "cache.kvq")
    loaded = QuantizedCache.load(tmp_path / "cache.kvq", config=gemma())
    for tokens in (0, 7, 150, 1):
        new = pairs([tokens], seed=tokens)[0]
        if tokens:
            for one in (cache, loaded):
                one.update(*new, 0)
        mine, theirs = cache.layers[0], loaded.layers[0]
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
        assert (mine.get_mask_sizes(1), mine.memory()) == (theirs.get_mask_sizes(1), theirs.memory())
    loaded.layers[0].crop(-1)


def test_a_file_tells_of_its_windows(tmp_path):
    """What was seen counts, gone or not; and a model with another window is another model."""
    path = tmp_path / "cache.kvq"
    filled((300, 9)).save(path)
    layer = describe(read_header(path))["layers"][0]
    assert (layer["kind"], layer["tokens"]) == ("quantized sliding window", 309)
    with pytest.raises(OtherModelError, match="a window of 80 tokens in the file and 90 in the model"):
        QuantizedCache.load(path, config=gemma(90))


@pytest.mark.parametrize(("name", "value"), [("hidden", 500), ("hidden", 75), ("sliding_window", 0)])
def test_what_is_out_of_view_must_be_possible(tmp_path, name, value):
    """A file cannot hide what the next token sees."""
    path = tmp_path / "cache.kvq"
    filled((300, *[1] * 9)).save(path)
    tampered(path, lambda description: description["layers"][0].update({name: value}))
    with pytest.raises(CacheFileError, match=r"out of view|sliding_window"):
        QuantizedCache.load(path)

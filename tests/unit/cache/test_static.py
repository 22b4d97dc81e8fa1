"""Layers and caches of fixed size, outside of a graph: what they hold is what a cache that grows would hold."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.nn import functional
from transformers import Gemma2Config, LlamaConfig, LlamaForCausalLM, MistralConfig, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from kvquant import QuantizedCache
from kvquant.attention.counters import counters
from kvquant.attention.static import StaticStates
from kvquant.cache.static import StaticQuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.errors import (
    CacheFileError,
    CacheFullError,
    OptionValueError,
    QuantizationError,
    ReadOnlyStatesError,
    StaleStatesError,
    UnsupportedError,
)
from tests.support import SMALL_MODEL, MinMax
from tests.unit.cache.helpers import make as growing
from tests.unit.cache.helpers import states

pytestmark = pytest.mark.usefixtures("formats")

ROOM = 64


def make(**options):
    chosen = {"backend": "test-affine", "group_size": 8, "residual_length": 8, "max_cache_len": ROOM, **options}
    return StaticQuantizedLayer(CacheConfig(**chosen), 3)


def filled(layer, tokens=40, steps=0, batch=1):
    """Prefill, then tokens one at a time; return what the last update handed out."""
    torch.manual_seed(0)
    out = layer.update(states(tokens, batch), states(tokens, batch))
    for _ in range(steps):
        out = layer.update(states(1, batch), states(1, batch))
    return out


def dense(handed_out):
    return [one.dequantize() if isinstance(one, StaticStates) else one for one in handed_out]


# ------------------------------------------------------------------------------------------------ what it holds


@pytest.mark.parametrize(("kind", "nbits"), [("affine", 4), ("codebook", 4), ("opaque", 4), ("codebook", 2.5)])
@pytest.mark.parametrize("sink", [0, 3])
def test_it_holds_what_a_layer_that_grows_holds(kind, nbits, sink):
    """In every format, after a prefill and many steps."""
    options = {"backend": f"test-{kind}", "sink_length": sink, "nbits": nbits, "outlier_share": 0.1}
    options |= {"smoothing_key": True, "smoothing_value": True, "scale_bits": 8}
    fixed, other = make(**options), growing(**options)
    filled(fixed, steps=20)
    filled(other, steps=20)
    assert torch.equal(fixed.keys, other.keys)
    assert torch.equal(fixed.values, other.values)
    assert len(fixed.stores[0].body) == len(other.stores[0].body) == 48


def test_room_is_made_once():
    """Neither page nor window are allocated again while the cache fills up, but for the window's own turns."""
    layer = make()
    filled(layer, 20)
    (page,) = layer.stores[0].body.pages
    addresses = [page.codes.data_ptr(), page.scale.data_ptr()]
    room = layer.memory().nbytes
    for _ in range(ROOM - 20):
        layer.update(states(1), states(1))
    assert layer.stores[0].body.pages == [page]
    assert [page.codes.data_ptr(), page.scale.data_ptr()] == addresses
    assert layer.memory().nbytes == room
    assert (page.capacity, page.length) == (56, 56)
    assert layer.stores[0].recent.data.shape[2] == 15  # the window of 8 and a block less one


def test_a_crop_keeps_the_room():
    """Into the body too, as long as whole blocks are left."""
    layer = make()
    filled(layer, 60)
    room = layer.memory().nbytes
    layer.crop(-36)
    assert layer.memory().nbytes == room
    assert (layer.get_seq_length(), layer.get_max_length()) == (24, ROOM)


def test_memory_that_is_not_in_use_yet_is_spare():
    """The report adds up to what is allocated."""
    layer = make()
    filled(layer, 24)
    parts = layer.memory().parts
    assert parts["codes"] == 2 * 2 * 16 * 8  # streams, heads, tokens, bytes of 16 codes of 4 bits
    assert parts["spare"] > 2 * parts["codes"]


# ------------------------------------------------------------------------------------------------ what it hands out


def test_shapes_are_the_same_at_every_step():
    """Those of a full cache; tokens that are not there are zeros."""
    layer = make()
    for tokens in (20, 1, 1):
        keys, values = layer.update(states(tokens), states(tokens))
        assert keys.shape == values.shape == (1, 2, ROOM, 16)
        assert layer.get_mask_sizes(tokens) == (ROOM, 0)
    assert torch.equal(keys.dequantize()[:, :, :22], layer.keys)
    assert not keys.dequantize()[:, :, 22:].any()
    assert keys.stride() == (0, 0, 0, 0)
    assert repr(keys) == (
        "StaticStates(key, shape=[1, 2, 64, 16], dtype=torch.float32, 22 tokens; .dequantize() gives the numbers)"
    )


def attend(query, keys, values, **options):
    return functional.scaled_dot_product_attention(query, keys, values, **options)


def test_the_prefill_attends_over_the_states_themselves():
    """Bit for bit what torch makes of them, however few bits there are."""
    layer, query, keys, values = make(nbits=1), states(40, heads=4), states(40), states(40)
    handed_out = layer.update(keys, values)
    expected = attend(query, keys, values, is_causal=True, enable_gqa=True)
    assert torch.equal(attend(query, *handed_out, is_causal=True, enable_gqa=True), expected)
    cut = [one[:, :, :40] for one in handed_out]
    assert torch.equal(attend(query, *cut, is_causal=True, enable_gqa=True), expected)
    mask = torch.ones(40, ROOM, dtype=torch.bool).tril()
    repeated = [one[:, :, None].expand(1, 2, 2, ROOM, 16).reshape(1, 4, ROOM, 16) for one in handed_out]
    plain = [one.repeat_interleave(2, dim=1) for one in (keys, values)]
    assert torch.equal(attend(query, *repeated, attn_mask=mask), attend(query, *plain, attn_mask=mask[:, :40]))


@pytest.mark.parametrize("tokens", [10, 40])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.float32])
def test_attention_sees_the_tokens_that_are_there(tokens, masked):
    """While nothing is quantised and after; padding is hidden by the mask, tokens to come by the layer."""
    layer = make()
    handed_out = filled(layer, tokens, steps=2)
    numbers, query, mask = (layer.keys, layer.values), states(1, heads=4), None
    if masked is not None:
        mask = (torch.arange(ROOM) >= 3)[None, None, None]
        mask = mask if masked == torch.bool else torch.zeros(1, 1, 1, ROOM).masked_fill(~mask, -torch.inf)
    counters.reset()
    got = attend(query, *handed_out, attn_mask=mask, enable_gqa=True)
    assert counters.materialised == 0
    expected = attend(query, *numbers, attn_mask=None if mask is None else mask[..., : tokens + 2], enable_gqa=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_attention_over_the_first_tokens_sees_no_others():
    """Whatever else the layer holds."""
    layer = make()
    handed_out, query = filled(layer, steps=2), states(1)
    got = attend(query, *(one[:, :, :30] for one in handed_out))
    torch.testing.assert_close(got, attend(query, layer.keys[:, :, :30], layer.values[:, :, :30]))


@pytest.mark.parametrize(
    "operation",
    [
        lambda keys: keys.transpose(2, 3),
        lambda keys: keys[:, 1],
        lambda keys: keys[:, :, 3:20],
        lambda keys: keys[:, :, None],
        lambda keys: keys * 2,
        lambda keys: torch.cat([keys, keys], dim=0),
        lambda keys: keys.repeat_interleave(2, dim=1),
        lambda keys: keys.to(torch.float64),
        lambda keys: keys.contiguous().sum(),
        copy.deepcopy,
        lambda keys: pickle.loads(pickle.dumps(keys)),  # noqa: S301  # of our own making
    ],
)
def test_every_other_operation_is_done_on_the_numbers(operation):
    """With zeros for tokens that are not there."""
    layer = make()
    keys, _ = filled(layer, steps=2)
    got = operation(keys)
    numbers = functional.pad(layer.keys, (0, 0, 0, ROOM - 42))
    assert torch.equal(got.dequantize() if isinstance(got, StaticStates) else got, operation(numbers))


def test_writes_are_refused():
    """They would be lost."""
    keys, _ = filled(make())
    with pytest.raises(ReadOnlyStatesError, match="mul_"):
        keys.mul_(2)


def test_states_of_an_earlier_step_are_not_read():
    """The layer keeps no history."""
    layer = make()
    keys, values = filled(layer)
    layer.crop(-1)
    with pytest.raises(StaleStatesError, match="key states"):
        keys.sum()
    with pytest.raises(StaleStatesError, match="value states"):
        attend(states(1), layer.update(states(1), states(1))[0], values)


@pytest.mark.parametrize("option", [{"dropout_p": 0.5}, {}])
def test_where_attention_is_not_fused_it_sees_the_same_tokens(option):
    """With dropout, and where the query wants a gradient, which it gets."""
    layer = make()
    handed_out, query = filled(layer, steps=2), states(1).requires_grad_(not option)
    torch.manual_seed(0)
    got = attend(query, *handed_out, **option)
    torch.manual_seed(0)
    mask = (torch.arange(ROOM) < 42)[None, None, None]
    numbers = [functional.pad(one, (0, 0, 0, ROOM - 42)) for one in (layer.keys, layer.values)]
    expected = attend(query, *numbers, attn_mask=mask, **option)
    torch.testing.assert_close(got, expected)
    if not option:
        assert torch.autograd.grad(got.sum(), query)[0].any()


def test_gradients_of_a_prefill_are_those_of_a_layer_that_grows():
    """They reach queries, keys and values."""
    made = []
    for layer in (make(), growing()):
        torch.manual_seed(0)
        given = [states(20).requires_grad_() for _ in range(3)]
        keys, values = layer.update(given[1], given[2])
        attend(given[0], keys, values, is_causal=True).square().sum().backward()
        made.append([one.grad for one in given])
    torch.testing.assert_close(*made)


@pytest.mark.parametrize("tokens", [10, 40])
def test_autocast_is_what_it_is_elsewhere(tokens):
    """Attention comes out in its type, packed or not."""
    layer = make()
    handed_out, query = filled(layer, tokens, steps=1), states(1)
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(query, *handed_out)
        expected = attend(query, layer.keys, layer.values)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------------ its limit


def test_what_has_no_room_is_refused_and_changes_nothing():
    """The error names the option, and what would do."""
    layer = make()
    filled(layer, 60)
    before, length = layer.memory(), int(layer._length)
    with pytest.raises(CacheFullError) as caught:
        layer.update(states(5), states(5))
    assert str(caught.value) == (
        "layer 3: max_cache_len=64 leaves no room for 5 more tokens beside the 60 that the cache holds; it counts "
        "prompt and new tokens together, and 65 would do; nothing was stored."
    )
    assert (caught.value.max_cache_len, caught.value.length, caught.value.added) == (64, 60, 5)
    assert (layer.memory(), int(layer._length)) == (before, length)
    layer.update(states(4), states(4))


def test_states_that_have_no_room_cannot_be_assigned():
    """Others can, of fewer tokens too."""
    layer = make()
    filled(layer)
    with pytest.raises(CacheFullError, match="no room for 65 more tokens beside the 0"):
        layer.keys = states(65)
    layer.keys, layer.values = states(30), states(30)
    assert layer.get_seq_length() == 30
    assert int(layer._length) == 30


def test_a_failure_of_the_backend_changes_nothing(backend):
    """Nor does it put the count of tokens out of step."""

    class Fails(MinMax):
        def quantize(self, rows):
            raise ValueError("never")

    layer = make(backend=backend(Fails))
    filled(layer, 15)
    with pytest.raises(QuantizationError, match="never"):
        layer.update(states(1), states(1))
    assert layer.get_seq_length() == int(layer._length) == 15


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "64"])
def test_other_values_are_refused(value):
    """With the option's name."""
    with pytest.raises(OptionValueError, match=r"max_cache_len=.* cannot work: expected a whole number of tokens"):
        CacheConfig(max_cache_len=value)


# ------------------------------------------------------------------------------------------------ other changes


def test_it_can_be_emptied_for_another_batch():
    """As any layer."""
    layer = make()
    filled(layer)
    layer.reset()
    assert (layer.get_seq_length(), int(layer._length)) == (0, 0)
    keys, _ = filled(layer, batch=3)
    assert keys.shape == (3, 2, ROOM, 16)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), copy.copy])  # noqa: S301
def test_a_copy_is_another_layer(copied):
    """Operators know the two apart."""
    layer = make(backend="reference")
    filled(layer)
    other = copied(layer)
    assert int(other._handle) != int(layer._handle)
    keys, _ = other.update(states(1), states(1))
    assert keys.dequantize()[:, :, :41].equal(other.keys)
    if copied is not copy.copy:
        assert layer.get_seq_length() == 40


def test_a_layer_goes_when_nobody_holds_it():
    """That operators know it does not keep it alive."""
    layer = make()
    filled(layer)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_beams_are_reordered_as_elsewhere():
    """Batch rows, their number included."""
    layer = make()
    filled(layer, batch=2)
    keys = layer.keys
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.keys, keys[[1, 0]])
    layer.batch_repeat_interleave(2)
    keys, _ = layer.update(states(1, 4), states(1, 4))
    assert keys.shape[0] == 4


# ------------------------------------------------------------------------------------------------ whole caches

CONFIG = LlamaConfig(**SMALL_MODEL)


def test_layers_that_are_not_quantised_are_those_of_transformers_cache_of_fixed_size():
    """Sliding windows and layers that are skipped; so the whole of the cache is fit for a graph."""
    config = Gemma2Config(**{**SMALL_MODEL, "num_hidden_layers": 4}, sliding_window=24)
    cache = QuantizedCache(config=config, max_cache_len=ROOM, skip_layers=[1])
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [StaticSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer, StaticQuantizedLayer]
    assert cache.is_compileable
    assert cache.get_max_length() == ROOM
    assert not QuantizedCache(config=config).is_compileable


def test_without_a_config_every_layer_is_of_fixed_size():
    """Masks are as wide from the first, before there are layers."""
    cache = QuantizedCache(max_cache_len=ROOM, skip_layers=[0])
    assert cache.is_compileable
    assert (cache.get_max_length(), cache.get_max_length(0), cache.get_mask_sizes(20, 0)) == (ROOM, ROOM, (ROOM, 0))
    for index in range(2):
        cache.update(states(20), states(20), index)
    assert [type(layer) for layer in cache.layers] == [StaticLayer, StaticQuantizedLayer]
    assert cache.is_compileable


def test_a_model_of_sliding_windows_alone_is_refused():
    """Nothing of it would be quantised."""
    config = MistralConfig(**SMALL_MODEL, sliding_window=24)
    with pytest.raises(
        UnsupportedError, match=r"with max_cache_len full attention alone is quantised.* leave max_cache"
    ):
        QuantizedCache(config=config, max_cache_len=ROOM)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def test_a_cache_is_saved_with_its_room_and_goes_on(tmp_path, model):
    """Layers of transformers' own included."""
    options = {"group_size": 8, "residual_length": 8, "max_cache_len": ROOM, "skip_layers": [0]}
    cache, ids = QuantizedCache(config=CONFIG, **options), torch.randint(2, 128, (1, 40))
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "cache.kvq", model=model)
        for given in ({"model": model}, {}):
            loaded = QuantizedCache.load(tmp_path / "cache.kvq", **given)
            assert [type(layer) for layer in loaded.layers] == [StaticLayer, StaticQuantizedLayer]
            assert loaded.layers[1].memory() == cache.layers[1].memory()
            got = model(ids[:, :9], past_key_values=loaded).logits
            expected = model(ids[:, :9], past_key_values=copy.deepcopy(cache)).logits
            torch.testing.assert_close(got, expected)
            with pytest.raises(CacheFullError):
                loaded.layers[1].update(states(16), states(16))


def test_a_file_with_more_tokens_than_room_is_refused(tmp_path, model):
    """It is no cache of ours."""
    cache = QuantizedCache(config=CONFIG, max_cache_len=ROOM, group_size=8, residual_length=8)
    with torch.inference_mode():
        model(torch.randint(2, 128, (1, 60)), past_key_values=cache)
    cache.config = CacheConfig(**{**cache.config.to_dict(), "max_cache_len": 50})
    cache.save(tmp_path / "cache.kvq")
    with pytest.raises(CacheFileError, match="room for"):
        QuantizedCache.load(tmp_path / "cache.kvq")


def test_prefill_and_steps_give_the_logits_of_a_cache_that_grows(model):
    """Left-padded, with the masks that transformers makes for each; the prefill to the last bit."""
    ids, shown = torch.randint(2, 128, (2, 30)), torch.ones(2, 50, dtype=torch.long)
    shown[0, :7] = 0
    made = []
    for cache in (
        QuantizedCache(config=CONFIG, group_size=8, residual_length=8),
        QuantizedCache(config=CONFIG, group_size=8, residual_length=8, max_cache_len=ROOM),
        StaticCache(config=CONFIG, max_cache_len=ROOM),
    ):
        with torch.inference_mode():
            logits = [model(ids, attention_mask=shown[:, :30], past_key_values=cache).logits]
            for at in range(31, 50):
                step = model(ids[:, at % 30, None], attention_mask=shown[:, :at], past_key_values=cache)
                logits.append(step.logits)
        made.append(torch.cat(logits, dim=1))
    grown, fixed, full = made
    assert torch.equal(fixed[:, :30], grown[:, :30])
    torch.testing.assert_close(fixed, grown, rtol=1e-5, atol=1e-5)
    assert not torch.equal(fixed[:, 30:], full[:, 30:])

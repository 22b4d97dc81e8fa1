"""One layer: bad input changes nothing, a failing backend loses nothing, assigning stores anew."""

import copy

import pytest
import torch

from kvquant.attention.states import QuantizedStates
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.errors import (
    BackendContractError,
    CropError,
    NonFiniteStatesError,
    PendingAssignmentError,
    QuantizationError,
    StatesError,
    UnsupportedError,
)
from kvquant.plugin import QuantizedRows
from tests.support import FORMATS, MinMax, OpaqueMinMax

pytestmark = pytest.mark.usefixtures("formats")


def states(tokens, batch=1, heads=2, width=16, dtype=torch.float32):
    return torch.randn(batch, heads, tokens, width).to(dtype)


def make(**options):
    return QuantizedLayer(
        CacheConfig(**{"backend": "test-affine", "group_size": 8, "residual_length": 8, **options}), 3
    )


def snapshot(layer):
    """Everything that can be read from a layer."""
    return layer.get_seq_length(), layer.keys, layer.values, layer.memory()


def assert_unchanged(layer, before):
    length, keys, values, memory = before
    assert (layer.get_seq_length(), layer.memory()) == (length, memory)
    assert torch.equal(layer.keys, keys)
    assert torch.equal(layer.values, values)


# ------------------------------------------------------------------------------------------------ updating


def test_the_first_update_hands_back_the_states_themselves():
    """A prefill attends in full precision, however much of it is quantised at once."""
    layer, keys, values = make(), states(100), states(100)
    returned = layer.update(keys, values)
    assert returned[0] is keys
    assert returned[1] is values
    assert len(layer.stores[0].body) == 88


def test_while_nothing_is_quantised_states_are_plain_tensors_without_a_copy():
    """The window costs what a plain cache costs, or less: nothing is concatenated."""
    layer = make(residual_length=1000)
    layer.update(states(5), states(5))
    with torch.no_grad():
        keys, _ = layer.update(states(1), states(1))
    assert type(keys) is torch.Tensor
    assert keys.untyped_storage().data_ptr() == layer.stores[0].recent.data.untyped_storage().data_ptr()
    assert type(layer.update(states(2000), states(2000))[0]) is QuantizedStates


def test_keys_and_values_may_differ_in_head_dim():
    """As in latent attention."""
    layer = make()
    layer.update(states(40, width=24), states(40, width=8))
    keys, values = layer.update(states(1, width=24), states(1, width=8))
    assert (keys.shape, values.shape) == ((1, 2, 41, 24), (1, 2, 41, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_states_come_back_in_their_own_dtype(backend, dtype):
    """Whatever the arithmetic in between."""
    layer = make(backend=backend(MinMax), nbits=8)
    given = states(40, dtype=dtype)
    layer.update(given, given)
    assert layer.keys.dtype == dtype
    assert (layer.keys.double() - given.double()).abs().max() < 0.05


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("keys", "values", "problem"),
    [
        (
            states(3)[0],
            states(3),
            "layer 3: key states need 4 dimensions [batch, kv_heads, tokens, head_dim], got [2, 3, 16]",
        ),
        (
            states(3),
            states(4),
            "layer 3: key and value states must agree in batch, heads and tokens, got [1, 2, 3, 16] and",
        ),
        (states(3, heads=1), states(3), "must agree in batch, heads and tokens"),
        (states(3).int(), states(3).int(), "key states need a floating type, got torch.int32"),
        (states(3), states(3).to("meta"), "key and value states must be on one device, got cpu and meta"),
    ],
)
def test_states_that_do_not_fit_each_other_are_refused(first, keys, values, problem):
    """On the first update and later; nothing is stored."""
    layer = make()
    if not first:
        layer.update(states(30), states(30))
        before = snapshot(layer)
    with pytest.raises(StatesError) as caught:
        layer.update(keys, values)
    assert problem in str(caught.value)
    assert str(caught.value).endswith("; nothing was stored.")
    if first:
        assert not layer.is_initialized
    else:
        assert_unchanged(layer, before)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"batch": 2}, "the batch size of the key states changed from 1 to 2"),
        ({"heads": 3}, "the number of heads of the key states changed from 2 to 3"),
        ({"width": 8}, "the head_dim of the key states changed from 16 to 8"),
        ({"dtype": torch.bfloat16}, "the dtype of the key states changed from torch.float32 to torch.bfloat16"),
    ],
)
def test_states_that_do_not_fit_what_is_held_are_refused(change, what):
    """The message says what changed, how much is held and how to start again."""
    layer = make()
    layer.update(states(30), states(30))
    before = snapshot(layer)
    with pytest.raises(StatesError) as caught:
        layer.update(states(1, **change), states(1, **change))
    assert str(caught.value) == f"layer 3: {what}; the cache holds 30 tokens, reset() empties it; nothing was stored."
    assert_unchanged(layer, before)


def test_states_on_another_device_are_refused():
    """The meta device stands in for a second GPU."""
    layer = make()
    layer.update(states(30), states(30))
    with pytest.raises(StatesError, match="the device of the key states changed from cpu to meta"):
        layer.update(states(1).to("meta"), states(1).to("meta"))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stream", ["key", "value"])
def test_nan_and_infinity_are_refused_with_layer_stream_and_tokens(poison, stream):
    """Positions count from the start of the sequence; nothing is stored."""
    layer = make()
    layer.update(states(30), states(30))
    before = snapshot(layer)
    bad, good = states(10), states(10)
    bad[0, 1, 4, 3] = bad[0, 0, 7, 0] = poison
    with pytest.raises(NonFiniteStatesError) as caught:
        layer.update(*((bad, good) if stream == "key" else (good, bad)))
    assert str(caught.value) == (
        f"layer 3: {stream} states hold NaN or infinity among tokens 34 to 37 (check_finite=False switches this check "
        "off); nothing was stored."
    )
    assert (caught.value.stream, caught.value.start, caught.value.stop) == (stream, 34, 38)
    assert_unchanged(layer, before)


def test_the_check_for_nan_can_be_switched_off():
    """In the window NaN is then just a number that comes back."""
    layer = make(check_finite=False)
    bad = states(3)
    bad[0, 0, 1, 0] = torch.nan
    layer.update(bad, states(3))
    assert layer.keys.isnan().sum() == 1


def test_a_group_that_does_not_fit_the_model_is_refused_on_the_first_update():
    """Without the model's config, head_dim is known only then; nothing is stored."""
    layer = make(group_size=48)
    with pytest.raises(
        UnsupportedError, match="group_size=48 does not divide head_dim=16; those that do: 1, 2, 4, 8, 16"
    ):
        layer.update(states(3), states(3))
    assert not layer.is_initialized


def test_a_dtype_that_the_backend_lacks_is_refused_on_the_first_update(backend):
    """float64 states are computed in float64, which not every backend takes."""
    layer = make(backend=backend(MinMax, dtypes=("float32",)))
    with pytest.raises(UnsupportedError, match="dtype='float64' is not supported; supported: float32"):
        layer.update(states(3, dtype=torch.float64), states(3, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------ failing backends


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("fails_on", [1, 2])  # keys, values
@pytest.mark.parametrize("kind", ["raises", "lies"])
def test_a_backend_that_fails_half_way_loses_nothing(backend, opaque, fails_on, kind):
    """The cache holds what it held, says what failed, and goes on once the backend works again."""
    base = OpaqueMinMax if opaque else MinMax
    failing = {"from": None, "calls": 0}

    class Failing(base):
        def quantize(self, rows):
            failing["calls"] += 1
            if failing["from"] is not None and failing["calls"] >= failing["from"]:
                if kind == "lies":
                    return "nonsense"
                raise RuntimeError("out of luck")
            return super().quantize(rows)

    layer = make(backend=backend(Failing, formats=("opaque" if opaque else "affine",)))
    layer.update(states(30), states(30))
    before = snapshot(layer)
    error, said = (
        (QuantizationError, f"failed on layer 3, {['key', 'value'][fails_on - 1]} states of tokens 16 to ")
        if kind == "raises"
        else (BackendContractError, "broke the plugin contract: quantize returned str")
    )
    for _ in range(2):  # failing again changes nothing either
        failing["from"] = failing["calls"] + fails_on
        with pytest.raises(error) as caught:
            layer.update(states(8), states(8))
        assert said in str(caught.value)
        assert_unchanged(layer, before)
    failing["from"] = None
    layer.update(states(8), states(8))
    assert layer.get_seq_length() == 38
    assert torch.equal(layer.keys[:, :, :16], before[1][:, :, :16])


def test_an_opaque_backend_that_fails_to_read_is_named(backend):
    """With layer, stream and the tokens of the block."""

    class Unreadable(OpaqueMinMax):
        def dequantize(self, packed):
            raise RuntimeError("cannot read")

    layer = make(backend=backend(Unreadable, formats=("opaque",)), sink_length=2)
    layer.update(states(30), states(30))
    with pytest.raises(
        QuantizationError, match="failed on layer 3, key states of tokens 2 to 9: RuntimeError: cannot read"
    ):
        _ = layer.keys


def test_codes_out_of_range_are_caught_before_they_are_stored(backend):
    """A wrong code would otherwise spill into its neighbours when packed."""

    class Loud(MinMax):
        def quantize(self, rows):
            good = super().quantize(rows)
            return QuantizedRows(good.codes + 1, good.scale, good.offset)

    layer = make(backend=backend(Loud))
    with pytest.raises(BackendContractError, match="code 16 is out of range for nbits=4; the largest is 15"):
        layer.update(states(30), states(30))
    assert not layer.is_initialized


# ------------------------------------------------------------------------------------------------ cropping


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            5,
            (
                "crop(5): crop takes the number of tokens to remove as a negative number, for example crop(-5). "
                "Nothing was removed."
            ),
        ),
        (-31, "crop(-31): the cache holds only 30 tokens; at most crop(-30) is possible. Nothing was removed."),
    ],
)
def test_impossible_crops_are_refused(argument, message):
    """Positive, or beyond the length."""
    layer = make()
    layer.update(states(30), states(30))
    before = snapshot(layer)
    with pytest.raises(CropError) as caught:
        layer.crop(argument)
    assert str(caught.value) == message
    assert_unchanged(layer, before)


def test_cropping_everything_leaves_an_empty_layer_that_can_go_on():
    """And quantises again as if new."""
    layer = make(sink_length=3)
    layer.update(states(60), states(60))
    layer.crop(-60)
    assert layer.get_seq_length() == 0
    given = states(60)
    assert layer.update(given, given)[0] is given
    assert torch.equal(layer.keys[:, :, :3], given[:, :, :3])


# ------------------------------------------------------------------------------------------------ assigning


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("removed", [0, 20])
def test_assigning_keys_alone_replaces_them_and_leaves_values(kind, removed):
    """What was exact is exact, what was quantised is quantised anew, also in pages that a crop cut inside a group."""
    layer = make(backend=f"test-{kind}", nbits=8, sink_length=2)
    layer.update(states(61), states(61))
    layer.crop(-removed)
    values, new = layer.values, states(61 - removed)
    layer.keys = new
    assert torch.equal(layer.values, values)
    body = slice(2, 2 + len(layer.stores[0].body))
    assert body.stop - body.start == len(layer.stores[1].body)
    assert torch.equal(layer.keys[:, :, :2], new[:, :, :2])
    assert torch.equal(layer.keys[:, :, body.stop :], new[:, :, body.stop :])
    assert 0 < (layer.keys - new).abs().max() < 0.1
    layer.update(states(30), states(30))
    assert layer.get_seq_length() == 91 - removed


def test_pruning_takes_effect_once_keys_and_values_are_assigned():
    """As pruning libraries do it: fewer tokens, keys first; the kept tokens are stored anew."""
    layer = make(nbits=8)
    layer.update(states(60), states(60))
    kept = torch.arange(0, 60, 2)
    keys, values = layer.keys[:, :, kept], layer.values[:, :, kept]
    layer.keys = keys
    with pytest.raises(PendingAssignmentError) as caught:
        layer.update(states(1), states(1))
    assert str(caught.value) == (
        "the key states of this layer were assigned with 30 tokens, but its values still hold 60. Assign values of 30 "
        "tokens first."
    )
    layer.values = values
    assert layer.get_seq_length() == 30
    torch.testing.assert_close(layer.keys, keys, atol=0.03, rtol=0)
    layer.update(states(1), states(1))
    assert layer.get_seq_length() == 31


def test_assigning_values_that_do_not_fit_the_assigned_keys_is_refused():
    """Both must agree before anything is replaced."""
    layer = make()
    layer.update(states(60), states(60))
    layer.keys = states(30)
    with pytest.raises(PendingAssignmentError, match="were assigned with 30 tokens, but its values still hold 20"):
        layer.values = states(20)


@pytest.mark.parametrize("wrong", [None, torch.randn(3, 4), "states"])
def test_only_states_can_be_assigned(wrong):
    """Anything else says what it should have been."""
    layer = make()
    layer.update(states(30), states(30))
    before = snapshot(layer)
    with pytest.raises(StatesError, match=r"only a tensor \[batch, kv_heads, tokens, head_dim\] can be assigned"):
        layer.keys = wrong
    assert_unchanged(layer, before)


def test_an_empty_layer_reads_as_none():
    """As transformers' layers do before their first update."""
    layer = make()
    assert layer.keys is None
    assert layer.values is None
    assert not layer.is_initialized
    assert not hasattr(layer, "batch_size")
    assert layer.memory().nbytes == 0


# ------------------------------------------------------------------------------------------------ batch and modes


def test_a_mask_selects_batch_rows():
    """As well as numbers do."""
    layer = make()
    layer.update(states(40, batch=3), states(40, batch=3))
    keys = layer.keys
    layer.batch_select_indices(torch.tensor([True, False, True]))
    assert torch.equal(layer.keys, keys[[0, 2]])
    assert layer.batch_size == 2


def test_a_row_that_does_not_exist_cannot_be_selected():
    """torch's own error, before anything changes."""
    layer = make()
    layer.update(states(40, batch=2), states(40, batch=2))
    before = snapshot(layer)
    with pytest.raises(IndexError):
        layer.batch_select_indices(torch.tensor([5]))
    assert_unchanged(layer, before)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cache_filled_in_inference_mode_goes_on_outside_it(kind):
    """Its tensors belong to no mode."""
    layer = make(backend=f"test-{kind}")
    with torch.inference_mode():
        layer.update(states(40, batch=2), states(40, batch=2))
    layer.update(states(40, batch=2), states(40, batch=2))
    layer.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        layer.crop(-30)
    assert layer.get_seq_length() == 50


def test_states_that_want_gradients_are_stored_without_them():
    """The first pass keeps its graph, because it gets its own states back."""
    layer = make()
    keys = states(40).requires_grad_()
    assert layer.update(keys, states(40))[0].requires_grad
    assert not layer.keys.requires_grad
    layer.update(states(1).requires_grad_(), states(1))


def test_an_offloaded_layer_comes_back():
    """Here to where it already is, which must change nothing."""
    layer = make()
    layer.update(states(40), states(40))
    before = snapshot(layer)
    layer.offload()
    layer.prefetch()
    assert_unchanged(layer, before)


def test_quantised_tokens_can_live_on_another_device():
    """`device` moves the body; on one machine the CPU is the only other place there is."""
    layer = make(device="cpu")
    layer.update(states(40), states(40))
    assert layer.stores[0].body.device == torch.device("cpu")


# ------------------------------------------------------------------------------------------------ found by review


def test_a_crop_on_a_block_boundary_forgets_opaque_blocks(formats):
    """What comes after takes their place."""
    layer = make(backend="test-opaque", nbits=8)
    numbers = torch.arange(40.0)[None, None, :, None].expand(1, 2, 40, 16)
    layer.update(numbers, numbers)
    layer.crop(-16)
    layer.update(100 + numbers[:, :, :16], 100 + numbers[:, :, :16])
    expected = [*range(24), *range(100, 116)]
    assert layer.keys[0, 0, :, 0].round().tolist() == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_exact_tokens_stay_exact_whatever_the_arithmetic_of_the_others(dtype):
    """`compute_dtype` is for the body; sink and window come back as they were given."""
    layer, given = make(compute_dtype=dtype, sink_length=3), states(64)
    layer.update(given, given)
    assert torch.equal(layer.keys[:, :, -8:], given[:, :, -8:])
    assert torch.equal(layer.keys[:, :, :3], given[:, :, :3])


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 8])
def test_float16_states_near_their_limits_come_back_finite(nbits):
    """Rounding must not lead beyond what float16 can hold."""
    layer = make(nbits=nbits, residual_length=0)
    given = ((torch.rand(1, 2, 64, 16) * 2 - 1) * 65504).half()
    given[:, :, ::3], given[:, :, 1::3] = 65504, -65504
    layer.update(given, given)
    assert layer.keys.isfinite().all()
    assert layer.values.isfinite().all()


@pytest.mark.parametrize("stream", ["key", "value"])
def test_running_out_of_memory_in_an_update_loses_nothing(monkeypatch, stream):
    """All that allocates comes before anything counts."""
    layer = make()
    layer.update(states(40), states(40))
    before = snapshot(layer)
    store = layer._stores[stream]

    def full(*_):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(store.recent, "plan", full)
    with pytest.raises(torch.OutOfMemoryError):
        layer.update(states(30), states(30))
    assert_unchanged(layer, before)


@pytest.mark.parametrize("argument", [-2.5, -2.0, "two"])
def test_a_crop_takes_whole_numbers(argument):
    """Anything else would corrupt the lengths."""
    layer = make()
    layer.update(states(30), states(30))
    with pytest.raises(CropError, match="crop takes a whole number of tokens"):
        layer.crop(argument)
    layer.crop(torch.tensor(-2))
    assert layer.get_seq_length() == 28


def test_a_window_under_autograd_is_not_written_to():
    """Backward through several updates works while everything is in the window."""
    layer, total = make(residual_length=1000), 0.0
    weight = torch.ones((), requires_grad=True)
    for _ in range(4):
        keys, values = layer.update(states(3) * weight, states(3) * weight)
        total = total + (keys * weight).sum() + (values * weight).sum()
    total.backward()
    assert weight.grad is not None


def test_a_copy_made_in_inference_mode_goes_on_outside_it():
    """As the cache itself does."""
    layer = make()
    layer.update(states(30), states(30))
    with torch.inference_mode():
        twin = copy.deepcopy(layer)
    twin.update(states(30), states(30))
    assert (layer.get_seq_length(), twin.get_seq_length()) == (30, 60)


def test_keys_and_values_may_differ_in_dtype():
    """Under autocast keys come in float32 and values in bfloat16; attention then does what torch does."""
    layer = make(nbits=8)
    layer.update(states(60), states(60, dtype=torch.bfloat16))
    keys, values = layer.update(states(1), states(1, dtype=torch.bfloat16))
    query = torch.randn(1, 2, 1, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        fused = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        plain = torch.nn.functional.scaled_dot_product_attention(query, layer.keys, layer.values)
    assert fused.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(fused, plain, rtol=3e-2, atol=3e-2)


def test_pages_stay_few_where_some_blocks_need_wide_scales():
    """Memory of a prefill does not multiply with blocks that float16 scales would harm."""
    layer = QuantizedLayer(CacheConfig(nbits=8, residual_length=0), 0)
    given = torch.randn(1, 2, 8192, 64) + torch.randn(1, 2, 1, 64) * 3
    layer.update(given, given)
    assert len(layer.stores[0].body.pages) <= 2


def test_cropping_again_and_again_keeps_memory_in_proportion():
    """Pages that a crop cut short give back what lies behind."""
    layer = make(group_size=64, residual_length=0)
    for _ in range(100):
        layer.update(states(64, width=64), states(64, width=64))
        layer.crop(-63)
    memory = layer.memory()
    assert memory.tokens == 100
    assert memory.parts["codes"] == 2 * 100 * 2 * 32
    assert memory.parts["spare"] < 256 * 2 * 2 * 64

"""One layer: a failing backend, full memory and impossible crops lose nothing."""

import copy

import pytest
import torch

from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.errors import (
    BackendContractError,
    CropError,
    QuantizationError,
)
from kvquant.plugin import QuantizedRows
from tests.support import MinMax, OpaqueMinMax
from tests.unit.cache.helpers import assert_unchanged, make, snapshot, states

pytestmark = pytest.mark.usefixtures("formats")


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

    broken = {"now": False}

    class Unreadable(OpaqueMinMax):
        def dequantize(self, packed):
            if broken["now"]:
                raise RuntimeError("cannot read")
            return super().dequantize(packed)

    layer = make(backend=backend(Unreadable, formats=("opaque",)), sink_length=2)
    layer.update(states(30), states(30))
    broken["now"] = True
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

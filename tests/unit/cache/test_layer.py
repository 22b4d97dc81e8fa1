"""One layer: what it hands out, and bad input that changes nothing."""

import pytest
import torch

from kvquant.attention.states import QuantizedStates
from kvquant.errors import (
    NonFiniteStatesError,
    StatesError,
    UnsupportedError,
)
from tests.support import MinMax
from tests.unit.cache.helpers import assert_unchanged, make, snapshot, states

pytestmark = pytest.mark.usefixtures("formats")


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


def test_states_without_numbers_are_refused():
    """On the meta device there are none to store beside those held."""
    layer = make()
    layer.update(states(30), states(30))
    with pytest.raises(StatesError, match="the key states are on meta, which holds no numbers"):
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

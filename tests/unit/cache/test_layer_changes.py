"""One layer: assigning stores anew, batch rows, and the modes of torch."""

import pytest
import torch

from kvquant.errors import (
    PendingAssignmentError,
    StatesError,
)
from tests.support import FORMATS, whole_width
from tests.unit.cache.helpers import assert_unchanged, make, snapshot, states

pytestmark = pytest.mark.usefixtures("formats")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("removed", [0, 20])
def test_assigning_keys_alone_replaces_them_and_leaves_values(kind, removed):
    """What was exact is exact, what was quantised is quantised anew, also in pages that a crop cut inside a group."""
    layer = make(backend=f"test-{kind}", nbits=(bits := whole_width(8, kind)), sink_length=2, outlier_share=0.1)
    layer.update(states(61), states(61))
    layer.crop(-removed)
    values, new = layer.values, states(61 - removed)
    layer.keys = new
    assert torch.equal(layer.values, values)
    body = slice(2, 2 + len(layer.stores[0].body))
    assert body.stop - body.start == len(layer.stores[1].body)
    assert torch.equal(layer.keys[:, :, :2], new[:, :, :2])
    assert torch.equal(layer.keys[:, :, body.stop :], new[:, :, body.stop :])
    assert 0 < (layer.keys - new).abs().max() < (0.1 if bits == 8 else 1.0)
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
    layer = make(backend=f"test-{kind}", nbits=whole_width(4, kind))
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

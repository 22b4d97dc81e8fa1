"""Updates of several tokens that are taken back in part, with the past recorded: as if the tokens came one by one."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from kvquant import QuantizedCache
from kvquant.cache.layer import QuantizedLayer
from kvquant.cache.layer_states import layer_state
from kvquant.cache.sliding import QuantizedSlidingLayer
from kvquant.engine.config import CacheConfig
from kvquant.errors import CacheFileError
from tests.support import FORMATS
from tests.unit.cache.files import tampered
from tests.unit.cache.helpers import states

pytestmark = pytest.mark.usefixtures("formats")


def make(kind="affine", residual=12, sink=0, window=None, group=4):
    options = {"backend": f"test-{kind}", "group_size": group, "nbits": 2, "outlier_share": 0.1}
    config = CacheConfig(**options, residual_length=residual, sink_length=sink)
    layer = QuantizedLayer(config, 0) if window is None else QuantizedSlidingLayer(config, 0, window)
    layer.activate_past_recording()
    return layer


def pairs(lengths, seed=0):
    torch.manual_seed(seed)
    return [(states(tokens), states(tokens, width=8)) for tokens in lengths]


def one_by_one(layer, pair):
    """Give a layer states token by token; return what each query saw."""
    seen = []
    for key, value in zip(pair[0].split(1, dim=2), pair[1].split(1, dim=2), strict=True):
        layer.update(key, value)
        seen.append([store.read() for store in layer.stores])
    return seen


def two_layers(kind, sink, window, held):
    """Two layers that hold the same tokens."""
    layers = [make(kind, sink=sink, window=window) for _ in range(2)]
    for layer in layers:
        layer.update(*pairs([held])[0])
    return layers


#: What a layer is and holds, and how many tokens are added to it.
UPDATES = {
    "kind": st.sampled_from(sorted(FORMATS)),
    "window": st.sampled_from([None, 60]),
    "sink": st.integers(0, 5),
    "held": st.integers(1, 90),
    "added": st.integers(1, 12),
}


@given(**UPDATES, accepted=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_what_is_taken_back_was_never_there(kind, window, sink, held, added, accepted):
    """Codes, scales, sink and window are those of a layer that only the accepted tokens reached."""
    (layer, other), new = two_layers(kind, sink, window, held), pairs([added], seed=1)[0]
    kept, (later,) = round(accepted * added), pairs([30], seed=2)
    layer.update(*new)
    layer.crop(kept - added)
    one_by_one(other, [states_[:, :, :kept] for states_ in new])
    for _ in range(2):
        assert layer.get_seq_length() == other.get_seq_length()
        for mine, theirs in zip(layer.stores, other.stores, strict=True):
            assert (mine.sink is None) == (theirs.sink is None)
            assert window is not None or len(mine.body) == len(theirs.body)
            assert torch.equal(mine.recent.view(), theirs.recent.view())
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
        for one in (layer, other):
            one_by_one(one, later)


@given(**UPDATES, masked=st.booleans())
@settings(max_examples=30, deadline=None)
def test_each_token_of_an_update_sees_what_it_would_see_alone(kind, window, sink, held, added, masked):
    """In attention over packed tokens: what later ones push out of the window is exact for those before."""
    (layer, other), new = two_layers(kind, sink, window, held), pairs([added], seed=1)[0]
    keys, values = layer.update(*new)
    query = torch.randn(1, 4, added, 16)
    total = keys.shape[2]
    visible = torch.ones(added, total, dtype=torch.bool).tril(total - added)
    if window is not None:
        visible &= ~torch.ones(added, total, dtype=torch.bool).tril(total - added - window)
    if masked:
        visible &= torch.rand(total) > 0.2
    visible[:, -added:] |= torch.eye(added, dtype=torch.bool)
    mixed = functional.scaled_dot_product_attention(query, keys, values, visible[None, None], enable_gqa=True)
    for at, (own_keys, own_values) in enumerate(one_by_one(other, new)):
        seen = visible[at, total - added + at + 1 - own_keys.shape[2] : total - added + at + 1]
        alone = functional.scaled_dot_product_attention(
            query[:, :, at : at + 1], own_keys, own_values, seen[None, None, None], enable_gqa=True
        )
        torch.testing.assert_close(mixed[:, :, at : at + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_prompt_may_bring_candidates_too():
    """Of a long first update the last tokens can be taken back, as many as stay exact."""
    layer, other = make(), make()
    (prompt,) = pairs([101])
    layer.update(*prompt)
    layer.crop(-9)
    other.update(*(part[:, :, :92] for part in prompt))
    assert torch.equal(layer.keys, other.keys)
    assert len(layer.stores[0].body) == len(other.stores[0].body)


def test_it_is_remembered_until_the_next_update_alone():
    """Rows are chosen, copies and files have it, and it counts as memory while it is there."""
    torch.manual_seed(0)
    layer = make()
    layer.update(states(30, batch=2), states(30, batch=2))
    layer.update(states(7, batch=2), states(7, batch=2))
    departed = layer.stores[0].departed
    assert departed is not None
    more = layer.memory().nbytes
    copied = copy.deepcopy(layer)
    for one in (layer, copied):
        one.batch_select_indices(torch.tensor([1]))
        one.crop(-7)
    assert torch.equal(layer.keys, copied.keys)
    assert layer.memory().nbytes < more
    layer.update(states(7), states(7))
    layer.update(states(1), states(1))
    assert layer.stores[0].departed is None


def saved(tmp_path):
    torch.manual_seed(0)
    cache = QuantizedCache("test-affine", group_size=4, residual_length=12)
    cache.update(states(30), states(30), 0)
    cache.activate_past_recording()
    cache.update(states(7), states(7), 0)
    cache.save(tmp_path / "cache.kvq")
    return cache


def test_a_loaded_cache_takes_back_what_a_saved_one_would(tmp_path):
    """To the last bit."""
    cache = saved(tmp_path)
    loaded = QuantizedCache.load(tmp_path / "cache.kvq")
    for one in (cache, loaded):
        one.crop(-6)
    assert torch.equal(cache.layers[0].keys, loaded.layers[0].keys)
    assert layer_state(cache.layers[0], "").meta == layer_state(loaded.layers[0], "").meta


@pytest.mark.parametrize("steps", [[], [4, 0], [-4, 4], [4000], ["4"], None])
def test_a_file_cannot_take_back_what_never_left(tmp_path, steps):
    """Steps that do not fit are refused."""
    saved(tmp_path)
    path = tampered(
        tmp_path / "cache.kvq", lambda description: description["layers"][0]["key"]["departed"].update(steps=steps)
    )
    with pytest.raises(CacheFileError, match="steps"):
        QuantizedCache.load(path)


def test_without_recording_nothing_more_is_kept():
    """Memory is what it was."""
    layer = make()
    layer.record_past = False
    layer.update(*pairs([30])[0])
    layer.update(*pairs([7])[0])
    assert layer.stores[0].departed is None

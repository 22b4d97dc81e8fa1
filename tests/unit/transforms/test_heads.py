"""Transforms at work in a cache."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import kvquant
from kvquant import QuantizedCache
from kvquant.errors import (
    CacheFileError,
    OptionValueError,
    TransformContractError,
    TransformFailedError,
    UnsupportedError,
)
from kvquant.plugin import TransformSpec
from kvquant.transforms.heads import head_transform


class Uneven:
    """Channels divided by powers of two: no rotation, so queries go another way than keys."""

    def __init__(self, head_dim):
        if head_dim > 64:
            raise ValueError("at most 64 channels work")
        self.factors = 2.0 ** (torch.arange(head_dim) % 4)

    def apply(self, states):
        return states / self.factors.to(states)

    def undo(self, states):
        return states * self.factors.to(states)

    apply_to_query = undo


@pytest.fixture
def known():
    """Register a factory as the transform "mine" for the time of a test."""

    def register(factory=Uneven):
        kvquant.register(TransformSpec("mine", factory), replace=True)

    yield register
    kvquant.unregister("mine", kind="transform")


def filled(tokens=300, **options):
    cache = QuantizedCache(residual_length=0, group_size=32, **options)
    states = torch.randn(1, 2, tokens, 32, generator=torch.Generator().manual_seed(0))
    cache.update(states, states.flip(2), 0)
    return cache, states


def test_all_layers_share_one(known):
    """It may hold a matrix."""
    known()
    plugin = kvquant.get_transform("mine")
    assert head_transform(plugin, 32) is head_transform(kvquant.get_transform("MINE"), 32)
    assert head_transform(plugin, 32) is not head_transform(plugin, 64)
    before = head_transform(plugin, 32)
    known(lambda head_dim: Uneven(head_dim))
    assert head_transform(kvquant.get_transform("mine"), 32) is not before


def test_a_factory_without_a_hash_works(known):
    """A dataclass that compares by value has none."""

    class Factory:
        __hash__ = None

        def __call__(self, head_dim):
            return Uneven(head_dim)

    known(Factory())
    cache, states = filled(nbits=8, rotation_key="mine")
    torch.testing.assert_close(cache.layers[0].keys, states, rtol=0, atol=0.1)


@pytest.mark.parametrize("backend", ["reference", "hqq", "quanto", "bitsandbytes"])
def test_it_works_with_every_backend(known, backend):
    """Which sees the states as they were mapped, and gives them back as they were."""
    known()
    cache, states = filled(backend=backend, nbits=8, rotation_key="mine", rotation_value="hadamard")
    torch.testing.assert_close(cache.layers[0].keys, states, rtol=0, atol=0.3)
    torch.testing.assert_close(cache.layers[0].values, states.flip(2), rtol=0, atol=0.3)


@pytest.mark.parametrize(("backend", "nbits", "share"), [("lloydmax", 4, 0.1), ("trellis", 3, 0.2)])
def test_it_works_with_backends_of_few_bits(known, backend, nbits, share):
    """As above, up to the error of the bits; `share` is of the length of the states."""
    known()
    plain = {"smoothing_key": False, "smoothing_value": False, "scale_bits": 16}
    cache, states = filled(backend=backend, nbits=nbits, rotation_key="mine", rotation_value="hadamard", **plain)
    for read, given in ((cache.layers[0].keys, states), (cache.layers[0].values, states.flip(2))):
        assert float((read - given).norm() / given.norm()) < share


@pytest.mark.parametrize("names", [("mine", None), (None, "mine"), ("mine", "mine")], ids=str)
def test_attention_maps_the_query_and_never_the_history(known, names):
    """Queries one way, results the other; also where the map is no rotation."""
    known()
    cache, _ = filled(nbits=4, rotation_key=names[0], rotation_value=names[1])
    query, new = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 1, 32)
    keys, values = cache.update(new, new, 0)
    fused = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    layer = cache.layers[0]
    plain = scaled_dot_product_attention(query, layer.keys, layer.values, enable_gqa=True)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_one_made_in_inference_mode_serves_later_gradients(known):
    """Objects are kept for the process, whatever mode they were first asked for in."""
    known()
    with torch.inference_mode():
        filled(nbits=4, rotation_key="mine")
    query = torch.ones(1, 32, requires_grad=True)
    head_transform(kvquant.get_transform("mine"), 32).apply_to_query(query).sum().backward()
    assert float(query.grad[0, 1]) == 2


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("stream", ["key", "value"])
def test_an_unknown_name_is_refused_at_once(stream):
    """Naming option, value and what would work; nothing is imported to find out."""
    option = f"rotation_{stream}"
    with pytest.raises(OptionValueError) as caught:
        QuantizedCache(**{option: "hadamart"})
    assert str(caught.value) == (
        f"{option}='hadamart' cannot work: expected the name of a transform, or None. Did you mean 'hadamard'? "
        "Installed: hadamard, random. Run 'kvquant list-transforms'."
    )
    with pytest.raises(OptionValueError, match=rf"layers\['1'\].{option}=7 cannot work: expected the name of a transf"):
        QuantizedCache(layers={1: {option: 7}})


def test_a_size_that_cannot_be_done_is_refused_before_anything_is_stored(known):
    """In the transform's words."""
    known()
    cache = QuantizedCache(rotation_value="mine")
    states = torch.randn(1, 1, 4, 80)
    with pytest.raises(UnsupportedError) as caught:
        cache.update(states, states, 0)
    assert "rotation_value='mine' does not work with head_dim=80: at most 64 channels work" in str(caught.value)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (
            lambda states: states[..., 1:],
            r"apply was given \[1, 2, 288, 32\] in float32 on cpu and returned \[1, 2",
        ),
        (lambda states: states.double(), "in float32 on cpu and returned .* in float64 on cpu"),
        (lambda states: None, "apply returned a NoneType and no tensor"),
    ],
    ids=["shape", "type", "nothing"],
)
def test_one_that_breaks_the_contract_is_named(known, wrong, problem):
    """And not the backend, which had nothing to do with it."""

    class Wrong(Uneven):
        def apply(self, states):
            return wrong(states)

    known(Wrong)
    with pytest.raises(TransformContractError, match=f"transform 'mine' broke the plugin contract: .*{problem}"):
        filled(rotation_key="mine")


def test_one_that_raises_is_named(known):
    """With what it was doing; its own error is the cause."""

    class Fails(Uneven):
        def apply(self, states):
            raise ZeroDivisionError("by nought")

    known(Fails)
    with pytest.raises(TransformFailedError) as caught:
        filled(rotation_key="mine")
    assert str(caught.value) == "transform 'mine' failed in its method apply: ZeroDivisionError: by nought"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# ------------------------------------------------------------------------------------------------ files


def test_a_saved_cache_comes_back_with_its_transform(known, tmp_path):
    """By its name."""
    known()
    cache, _ = filled(nbits=4, rotation_key="mine")
    cache.save(tmp_path / "cache.kvq")
    loaded = QuantizedCache.load(tmp_path / "cache.kvq")
    assert loaded.config.rotation_key == "mine"
    assert torch.equal(loaded.layers[0].keys, cache.layers[0].keys)


def test_it_is_not_read_without_its_transform(tmp_path):
    """The error says which one."""
    kvquant.register(TransformSpec("fleeting", Uneven))
    cache, _ = filled(nbits=4, rotation_value="fleeting")
    cache.save(tmp_path / "cache.kvq")
    kvquant.unregister("fleeting", kind="transform")
    with pytest.raises(CacheFileError, match=r"its options cannot work here: rotation_value='fleeting' cannot work"):
        QuantizedCache.load(tmp_path / "cache.kvq")


def test_it_is_not_read_with_another_map_of_the_same_name(known, tmp_path):
    """As another version of a plugin may have."""
    known()
    cache, _ = filled(nbits=4, rotation_key="mine")
    cache.save(tmp_path / "cache.kvq")

    class Other(Uneven):
        def __init__(self, head_dim):
            super().__init__(head_dim)
            self.factors = self.factors.flip(0)

    known(Other)
    with pytest.raises(CacheFileError, match="a transform 'mine' that was another map than the one that is here"):
        QuantizedCache.load(tmp_path / "cache.kvq")

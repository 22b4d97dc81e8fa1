"""Caches of other models, and of other backends: refused, and what differs is named."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kvquant import QuantizedCache
from kvquant.cache.fingerprint import ModelIdentity
from kvquant.errors import CacheFileError, OtherModelError, UnknownBackendError
from tests.support import SMALL_MODEL
from tests.unit.cache.files import GEMMA, OPTIONS, make, tampered

pytestmark = pytest.mark.usefixtures("formats")


@pytest.fixture
def saved(tmp_path):
    return make(tmp_path / "cache.kvq")


# ------------------------------------------------------------------------------------------------ other models


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_MODEL)).eval()


def of(model, path):
    cache = QuantizedCache("test-affine", model.config, **OPTIONS)
    with torch.inference_mode():
        model(torch.arange(60)[None], past_key_values=cache, use_cache=True)
    cache.save(path, model=model)
    return path


def test_the_cache_of_other_weights_is_refused(tmp_path, llama):
    """One number in one layer suffices."""
    path = of(llama, tmp_path / "cache.kvq")
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    QuantizedCache.load(path, model=llama)
    with pytest.raises(OtherModelError, match="Its weights are others"):
        QuantizedCache.load(path, model=other)


def test_what_differs_is_named(tmp_path, llama):
    """An entry of the config, however deep; the type of the weights; the architecture."""
    path = of(llama, tmp_path / "cache.kvq")
    config = copy.deepcopy(llama.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    with pytest.raises(OtherModelError, match=r"rope_parameters.rope_theta is 10000.0 in the file and 500000.0"):
        QuantizedCache.load(path, config=config)
    with pytest.raises(OtherModelError, match="dtype is float32 in the file and bfloat16 in the model"):
        QuantizedCache.load(path, model=copy.deepcopy(llama).bfloat16())
    QuantizedCache.load(path, config=llama.config)


def test_what_is_beside_the_point_does_not_count(llama):
    """How attention is computed, and where a model came from."""
    identity, other = ModelIdentity.of(llama), copy.deepcopy(llama)
    other.config._name_or_path, other.config.use_cache = "elsewhere", False
    other.config._attn_implementation = "eager"
    assert identity.differences(other) == []


def test_a_file_that_does_not_know_its_model(saved, llama):
    """Cannot be said to be of this one; its shapes can be compared with a config."""
    with pytest.raises(OtherModelError, match=r"does not say which model it is of: save with model=..."):
        QuantizedCache.load(saved, model=llama)
    QuantizedCache.load(saved, config=llama.config)


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        (LlamaConfig(**{**SMALL_MODEL, "num_hidden_layers": 3}), "It has 2 layers, and the model has 3"),
        (LlamaConfig(**{**SMALL_MODEL, "head_dim": 32}), "heads of layer 0 have 16 channels, and 32 in the model"),
        (GEMMA, "layer 0 is quantized in the file and DynamicSlidingWindowLayer in the model"),
    ],
)
def test_other_shapes_are_refused(saved, config, difference):
    """Layers, their kinds and their heads."""
    with pytest.raises(OtherModelError, match=difference):
        QuantizedCache.load(saved, config=config)


def test_another_sliding_window_is_refused(tmp_path):
    """Layers of transformers' own have sizes, too."""
    path = make(tmp_path / "cache.kvq", config=GEMMA)
    other = copy.deepcopy(GEMMA)
    other.sliding_window = 16
    with pytest.raises(CacheFileError, match="has sliding_window=8, and the model's is 16"):
        QuantizedCache.load(path, config=other)


# ------------------------------------------------------------------------------------------------ backends


def test_a_backend_that_is_not_here(saved):
    """Is named as it is where users name it."""
    with pytest.raises(UnknownBackendError, match="Did you mean 'test-affine'"):
        QuantizedCache.load(tampered(saved, lambda told: told["config"].update(backend="test-affin")))


def test_opaque_blocks_of_another_version_are_refused(tmp_path):
    """Only the backend can read them, and it may have changed its mind."""
    path = make(tmp_path / "cache.kvq", "test-opaque")
    QuantizedCache.load(path)
    tampered(path, lambda told: told["versions"]["backends"]["test-opaque"].update(version="0.9"))
    with pytest.raises(CacheFileError, match=r"in a format of its own, in in-process 0\.9; here is in-process"):
        QuantizedCache.load(path)


def test_opaque_blocks_that_their_backend_cannot_read_are_refused(tmp_path):
    """When they are loaded, not when attention comes to them."""
    path = make(tmp_path / "cache.kvq", "test-opaque")

    def exchange(told):
        for layer in told["layers"]:
            layer["key"]["body"]["pages"][0]["layouts"][0]["names"] = ["codes", "scale", "other"]

    with pytest.raises(CacheFileError, match="cannot be read by the backend 'test-opaque'"):
        QuantizedCache.load(tampered(path, exchange))

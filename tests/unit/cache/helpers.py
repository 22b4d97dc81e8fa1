"""Layers, and states for them."""

import torch

from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig


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

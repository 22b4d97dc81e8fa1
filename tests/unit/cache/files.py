"""Saved caches for tests: what two caches have in common, and files that were tampered with by somebody who knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3TextConfig

from kvquant import QuantizedCache
from kvquant.cache.header import header_bytes, read_header
from kvquant.cache.layer import QuantizedLayer
from kvquant.cache.layer_states import layer_state
from kvquant.engine.state import Stack

OPTIONS = {"nbits": 3, "group_size": 8, "residual_length": 8, "sink_length": 2}
GEMMA = Gemma3TextConfig(
    num_hidden_layers=2, sliding_window=8, head_dim=16, layer_types=["sliding_attention", "full_attention"]
)


def assert_same(one: Any, other: Any) -> None:
    """Two caches are the same: bit for bit what they hold, how it is laid out, what it takes, what they are made of."""
    assert len(one.layers) == len(other.layers)
    assert one.config == other.config
    for index, pair in enumerate(zip(one.layers, other.layers, strict=True)):
        mine, theirs = (layer_state(layer, str(index)) for layer in pair)
        assert mine.meta == theirs.meta
        assert mine.tensors.keys() == theirs.tensors.keys()
        for name, tensor in mine.tensors.items():
            for a, b in zip(_bytes(tensor), _bytes(theirs.tensors[name]), strict=True):
                assert torch.equal(a, b), name
        if isinstance(pair[0], QuantizedLayer):
            assert pair[0].memory() == pair[1].memory()


def _bytes(tensor: Any) -> list[torch.Tensor]:
    parts = tensor.parts if isinstance(tensor, Stack) else (tensor,)
    return [part.contiguous().view(torch.uint8) if part.dim() else part for part in parts]


def tampered(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Have `change` alter a file's description, and make its checksums right again."""
    header = read_header(path)
    description = json.loads(json.dumps(header.description))
    change(description)
    numbers = path.read_bytes()[header.start :]
    path.write_bytes(header_bytes(json.dumps(description), header.entries, header.checksums) + numbers)
    return path


def make(path: Path, backend: str = "test-affine", config: Any = None, batch: int = 1) -> Path:
    """Save a small cache of two layers, most of it quantised."""
    cache = QuantizedCache(backend, config, **OPTIONS)
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        cache.update(*(torch.randn(batch, 2, 60, 16, generator=generator) for _ in range(2)), layer)
    cache.save(path)
    return path

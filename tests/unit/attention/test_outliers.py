"""Attention to outlier tokens, beside a kernel that leaves them out; what kernels do is in the tests of each.

The kernel here is the one for the CPU, of one kind of stream.
"""

import pytest
import torch

from kvquant.attention import outliers, tiles
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from tests.support import Largest, MinMax, exact_attention

numba_kernels = pytest.importorskip("kvquant.attention.numba_kernels", reason="numba is not installed")


def filled(backend, tokens, *, heads=2, **options):
    """A layer of `tokens` random tokens."""
    options = {"nbits": 2, "group_size": 32, "residual_length": 8, "outlier_share": 0.1, **options}
    layer = QuantizedLayer(CacheConfig(backend=backend, **options), 0)
    layer.update(*(torch.randn(1, heads, tokens, 64) for _ in range(2)))
    return layer


def attend(layer, query, kernel=numba_kernels.attend_body):
    return tiles.attend(query, *layer.stores, None, is_causal=False, scale=None, kernel=kernel)


@pytest.mark.parametrize("size", [1, 1 << 12])
@pytest.mark.parametrize("rotations", [(None, None), ("hadamard", "random")])
def test_a_few_blocks_at_a_time_give_the_same(backend, monkeypatch, size, rotations):
    """Over several pages, one of which a crop has left ending inside a block."""
    layer = filled(backend(MinMax), 900, rotation_key=rotations[0], rotation_value=rotations[1])
    layer.crop(-300)
    layer.update(*(torch.randn(1, 2, 400, 64) for _ in range(2)))
    assert layer.stores[0].body.pages[0].length % 32
    monkeypatch.setattr(outliers, "TILE_ELEMENTS", size)
    query = torch.randn(1, 8, 3, 64)
    expected = exact_attention(query, *(store.tile(0, len(store)) for store in layer.stores))
    torch.testing.assert_close(attend(layer, query).double(), expected, rtol=0, atol=1e-4)


def test_no_digit_is_lost_where_codes_give_a_token_all_the_weight(backend):
    """Keys that codes have as something else altogether are outliers, and their codes have no part in it."""

    class Wild(MinMax):
        def quantize(self, rows):
            plain = super().quantize(rows)
            wild = torch.arange(len(rows)).remainder(64) < 2  # both groups of one token in 32
            plain.offset[wild] += 100
            return plain

    layer = filled(backend(Wild), 700, heads=1, axis_key="token", axis_value="token", outlier_share=0.01)
    keys, values = layer.stores
    query = torch.rand(1, 4, 1, 64)
    codes = keys.body.pages[0].dequantize(0, 640, torch.float32)
    assert (query @ codes.transpose(2, 3) * 64**-0.5).amax() > 50
    expected = exact_attention(query, *(store.tile(0, len(store)) for store in (keys, values)))
    torch.testing.assert_close(attend(layer, query).double(), expected, rtol=0, atol=2e-5)


def test_no_temporary_grows_with_the_context(backend, monkeypatch):
    """At eight times the context, the largest tensor made on the way is no larger."""
    monkeypatch.setattr(outliers, "TILE_ELEMENTS", 1 << 13)
    name, sizes = backend(MinMax), {}
    for tokens in (1000, 8000):
        layer = filled(name, tokens)
        with Largest() as largest:
            attend(layer, torch.randn(1, 4, 1, 64))
        sizes[tokens] = largest.temporary(layer)
    assert sizes[8000] <= sizes[1000]

"""Invariant 6 for plain torch: attention over the stores equals attention over what they read as.

The reference is computed in float64 from the dequantised states. Tolerances follow from the arithmetic: a score is a
sum of head_dim float32 products and an output a sum over tokens, so a few hundred float32 roundings at most.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from kvquant.attention import tiles
from kvquant.attention.counters import counters
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine import encode
from kvquant.engine.config import CacheConfig
from kvquant.engine.packing import WIDTHS
from tests.support import FORMATS, Largest, exact_attention, possible_width

pytestmark = pytest.mark.usefixtures("formats")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def filled(tokens, *, batch=1, heads=2, widths=(16, 16), dtype=torch.float32, **options):
    """A layer that holds `tokens` random tokens in body and window, and what its last update returned."""
    options = {"backend": "test-affine", "group_size": 8, "residual_length": 8, **options}
    layer = QuantizedLayer(CacheConfig(**options), 0)
    shapes = [(batch, heads, tokens, width) for width in widths]
    layer.update(*(torch.randn(shape).to(dtype)[:, :, :-1] for shape in shapes))
    return layer, layer.update(*(torch.randn(shape).to(dtype)[:, :, -1:] for shape in shapes))


MASKS = ["none", "bool", "additive", "causal", "per head", "row", "padding"]


@given(
    kind=st.sampled_from(list(FORMATS)),
    axes=st.tuples(*[st.sampled_from(["channel", "token"])] * 2),
    bits=st.tuples(*[st.sampled_from(WIDTHS)] * 2),
    groups=st.sampled_from([1, 2, 4]),
    widths=st.sampled_from([(16, 16), (8, 24), (80, 32)]),
    batch=st.integers(1, 3),
    queries=st.sampled_from([1, 2, 7]),
    tokens=st.integers(60, 300),
    masking=st.sampled_from(MASKS),
    scale=st.sampled_from([None, 0.3]),
    dtype=st.sampled_from(list(TOLERANCE)),
    sink=st.sampled_from([0, 3]),
    small=st.booleans(),
    rotations=st.tuples(*[st.sampled_from([None, None, "hadamard", "random"])] * 2),
    smoothing=st.tuples(st.booleans(), st.booleans()),
    scale_bits=st.sampled_from([8, 16]),
    outliers=st.sampled_from([0, 0, 0.01, 0.3]),
)
def test_fused_equals_dequantised(
    kind,
    axes,
    bits,
    groups,
    widths,
    batch,
    queries,
    tokens,
    masking,
    scale,
    dtype,
    sink,
    small,
    rotations,
    smoothing,
    scale_bits,
    outliers,
):
    """For every format, axis, width, grouped-query ratio, mask, scale, dtype, rotation and tile."""
    bits = [possible_width(each, kind, axis, 8, width) for each, axis, width in zip(bits, axes, widths, strict=True)]
    layer, (keys, values) = filled(
        tokens,
        batch=batch,
        widths=widths,
        dtype=dtype,
        backend=f"test-{kind}",
        axis_key=axes[0],
        axis_value=axes[1],
        nbits_key=bits[0],
        nbits_value=bits[1],
        sink_length=sink,
        rotation_key=rotations[0],
        rotation_value=rotations[1],
        smoothing_key=smoothing[0],
        smoothing_value=smoothing[1],
        scale_bits=scale_bits,
        outlier_share=outliers,
    )
    heads = 2 * groups
    query = torch.randn(batch, heads, queries, widths[0]).to(dtype)
    mask = {
        "bool": torch.rand(batch, 1, queries, tokens) > 0.4,
        "additive": torch.randn(batch, 1, queries, tokens).to(dtype),
        "per head": torch.rand(1, heads, queries, tokens) > 0.4,
        "row": torch.rand(queries, tokens) > 0.4,
        "padding": torch.rand(batch, 1, 1, tokens) > 0.4,
    }.get(masking)
    causal = masking == "causal"
    counters.reset()
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(tiles, "TILE_ELEMENTS", 1)
        fused = scaled_dot_product_attention(query, keys, values, mask, 0.0, causal, scale=scale, enable_gqa=groups > 1)
    assert (counters.fused, counters.materialised) == (1, 0)
    expected = exact_attention(query, layer.keys, layer.values, mask, is_causal=causal, scale=scale)
    assert fused.dtype == dtype
    assert fused.shape == expected.shape
    seen = mask is None or mask.dtype != torch.bool or mask.any(-1).all()
    if seen:
        assert torch.isfinite(fused).all()
    torch.testing.assert_close(fused.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [True, False])
def test_long_queries_go_through_in_parts(causal):
    """A prompt over a quantised body, more than the query tokens attended at once, with a mask or causal."""
    layer, (keys, values) = filled(300)
    query = torch.randn(1, 4, 300, 16)
    mask = None if causal else torch.rand(1, 4, 300, 300) > 0.3
    fused = scaled_dot_product_attention(query, keys, values, mask, is_causal=causal, enable_gqa=True)
    expected = exact_attention(query, layer.keys, layer.values, mask, is_causal=causal)
    torch.testing.assert_close(fused.double(), expected, rtol=2e-5, atol=2e-5)


def test_a_query_that_may_see_nothing_gets_zeros():
    """As in torch, and without a NaN on the way."""
    layer, (keys, values) = filled(100)
    query, mask = torch.randn(1, 2, 2, 16), torch.ones(1, 1, 2, 100, dtype=torch.bool)
    mask[:, :, 0] = False
    fused = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    plain = scaled_dot_product_attention(query, layer.keys, layer.values, attn_mask=mask)
    assert torch.equal(fused[:, :, 0], torch.zeros(1, 2, 16))
    torch.testing.assert_close(fused, plain)


def test_huge_scores_do_not_overflow():
    """The running maximum keeps every exponential at one or below, also when the largest score comes last."""
    layer, (keys, values) = filled(200)
    query = layer.keys[:, :, -1:] * 1e4
    fused = scaled_dot_product_attention(query, keys, values)
    assert torch.isfinite(fused).all()
    torch.testing.assert_close(fused, scaled_dot_product_attention(query, layer.keys, layer.values))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_attention_computes_in_the_dtype_asked_for(dtype, tolerance):
    """`compute_dtype` trades digits for speed; the softmax itself stays in float32."""
    layer, (keys, values) = filled(300, compute_dtype=dtype)
    assert layer.stores[0].tile(0, 8).dtype == dtype
    query = torch.randn(1, 4, 1, 16)
    fused = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    assert fused.dtype == torch.float32
    expected = exact_attention(query, layer.keys, layer.values)
    torch.testing.assert_close(fused.double(), expected, rtol=tolerance, atol=tolerance)


def test_no_temporary_of_a_decode_step_grows_with_the_context():
    """Invariant 7: at sixteen times the context, the largest tensor made on the way is no larger."""
    sizes = {}
    for tokens in (500, 8000):
        layer, _ = filled(tokens, heads=2, widths=(64, 64), group_size=32, residual_length=64)
        with pytest.MonkeyPatch.context() as patch, Largest() as largest:
            patch.setattr(tiles, "TILE_ELEMENTS", 1 << 14)
            for _ in range(70):  # enough for a block to leave the window
                keys, values = layer.update(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64))
                scaled_dot_product_attention(torch.randn(1, 4, 1, 64), keys, values, enable_gqa=True)
        sizes[tokens] = largest.temporary(layer)
    assert sizes[8000] <= sizes[500]


def test_no_temporary_of_a_prefill_grows_with_its_length():
    """Invariant 7: states are quantised in bounded chunks, straight into the pages where they stay."""
    sizes = {}
    for tokens in (1000, 40_000):
        states = torch.randn(1, 1, 1, 64).expand(1, 2, tokens, 64)  # little memory, so that the test needs little
        layer = QuantizedLayer(CacheConfig(backend="test-affine", group_size=32), 0)
        with pytest.MonkeyPatch.context() as patch, Largest() as largest:
            patch.setattr(encode, "CHUNK_ELEMENTS", 1 << 16)
            layer.update(states, states)
        sizes[tokens] = largest.temporary(layer)
    assert sizes[40_000] <= sizes[1000]

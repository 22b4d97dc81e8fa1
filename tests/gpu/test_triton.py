"""What the interpreter shows of Triton's kernels holds on the device, at a length that fills it."""

import os

import pytest
import torch

from kvquant.attention import tiles, triton_kernels
from tests.support import exact_attention
from tests.unit.attention.test_triton import exact, filled, made_mask

pytestmark = [
    pytest.mark.usefixtures("formats"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted, not run"),
]

#: ``(format, axes, bits, group sizes, head dims, query heads, query tokens, mask)``
CASES = [
    ("affine", ("channel", "token"), (4, 4), (64, 64), (128, 128), 8, 1, "none"),
    ("affine", ("channel", "token"), (2, 2), (32, 32), (128, 128), 8, 1, "padding"),
    ("affine", ("token", "channel"), (3, 8), (16, 24), (80, 112), 2, 3, "bool"),
    ("affine", ("channel", "channel"), (1, 4), (64, 32), (64, 256), 16, 16, "additive"),
    ("codebook", ("channel", "token"), (4, 3), (64, 64), (256, 256), 8, 5, "per head"),
    ("codebook", ("token", "token"), (2, 8), (32, 4), (96, 32), 4, 16, "causal"),
    ("affine", ("channel", "token"), (2.5, 3.5), (64, 32), (128, 64), 8, 1, "none"),
    ("codebook", ("token", "channel"), (1.5, 2.5), (16, 32), (96, 128), 4, 1, "none"),
]


@pytest.mark.parametrize(("kind", "axes", "bits", "sizes", "widths", "heads", "queries", "masking"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_equals_dequantised(kind, axes, bits, sizes, widths, heads, queries, masking, dtype):
    """For 8k tokens and a batch of two: against float64, as closely as float32 rounds."""
    options = {
        "backend": f"test-{kind}",
        "axis_key": axes[0],
        "axis_value": axes[1],
        "nbits_key": bits[0],
        "nbits_value": bits[1],
        "group_size_key": sizes[0],
        "group_size_value": sizes[1],
    }
    keys, values = filled(8192, batch=2, heads=2, widths=widths, dtype=dtype, again=333, on="cuda", **options)
    query = torch.randn(2, heads, queries, widths[0], device="cuda").to(dtype)
    mask = made_mask(masking, 2, heads, queries, len(keys), dtype)
    mask = None if mask is None else mask.cuda()
    assert triton_kernels.why_not(keys.body, values.body) == ""
    causal = masking == "causal"
    out = tiles.attend(query, keys, values, mask, is_causal=causal, scale=None, kernel=triton_kernels.attend_body)
    expected = exact_attention(query, exact(keys), exact(values), mask, is_causal=causal)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    torch.testing.assert_close(out.double(), expected, rtol=rounding + 2e-5, atol=2e-5)

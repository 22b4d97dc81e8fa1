"""What the interpreter shows of Triton's kernels holds on the device, at a length that fills it."""

import pytest
import torch

from tests.unit.attention.test_triton import check, filled, made_mask

pytestmark = pytest.mark.usefixtures("formats")

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
    ("trellis", ("channel", "token"), (2, 3), (64, 32), (128, 128), 8, 1, "none"),
    ("trellis", ("token", "channel"), (3, 1), (16, 24), (80, 112), 4, 3, "padding"),
    ("trellis", ("token", "channel"), (1, 2), (5, 32), (20, 256), 16, 1, "per head"),
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
    check(query, keys, values, None if mask is None else mask.cuda(), is_causal=masking == "causal")


@pytest.mark.parametrize("kind", ["affine", "trellis"])
def test_scores_are_soft_capped_with_what_smoothing_took_off_the_keys(kind):
    """By the kernel: a cap is for whole scores."""
    options = {"smoothing_key": True, "mean": 2.0, "outlier_share": 0.1, "nbits": 3, "scale_bits": 8}
    keys, values = filled(4096, batch=2, heads=2, widths=(64, 64), on="cuda", backend=f"test-{kind}", **options)
    check(torch.randn(2, 8, 1, 64, device="cuda"), keys, values, softcap=3.0, size=3.0)

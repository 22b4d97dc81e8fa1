"""What the CPU tests show holds on CUDA too."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from kvquant import QuantizedCache
from kvquant.attention.counters import counters
from kvquant.demo import MODEL_DIR

BACKENDS = [
    ("reference", 2),
    ("reference", 3),
    ("lloydmax", 3),
    ("trellis", 2),
    ("hqq", 2),
    ("quanto", 4),
    ("bitsandbytes", 4),
]


@pytest.mark.parametrize(("backend", "nbits"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_equals_dequantised(backend, nbits, dtype):
    """Attention over packed tokens on the device, against torch's own over the dequantised ones."""
    cache = QuantizedCache(backend, nbits=nbits)
    shape = (2, 4, 700, 64)
    cache.update(*(torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2)), 0)
    keys, values = cache.update(*(torch.randn(2, 4, 1, 64, device="cuda", dtype=dtype) for _ in range(2)), 0)
    query = torch.randn(2, 8, 3, 64, device="cuda", dtype=dtype)
    counters.reset()
    fused = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    assert (counters.fused, counters.materialised) == (1, 0)
    layer = cache.layers[0]
    plain = scaled_dot_product_attention(query.double(), layer.keys.double(), layer.values.double(), enable_gqa=True)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(fused.double(), plain, rtol=tolerance, atol=tolerance)


def test_codes_are_those_of_the_cpu():
    """The reference backend rounds alike on both."""
    states = torch.randn(1, 2, 700, 64)
    here, there = QuantizedCache(nbits=4), QuantizedCache(nbits=4)
    here.update(states, states, 0)
    there.update(states.cuda(), states.cuda(), 0)
    torch.testing.assert_close(there.layers[0].keys.cpu(), here.layers[0].keys)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_generation(device):
    """With the body on the device, and with the body in host memory."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).cuda().eval()
    prompt = torch.randint(3, 4000, (2, 400), device="cuda")
    cache = QuantizedCache(nbits=4, config=model.config, device=device)
    out = model.generate(prompt, past_key_values=cache, max_new_tokens=100, min_new_tokens=100, num_beams=2)
    assert out.shape == (2, 500)
    assert cache.layers[0].stores[0].body.pages[0].codes.device.type == (device or "cuda")

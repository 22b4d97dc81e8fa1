"""Decoding with the fused kernel: every step, in every mode of `generate`, with no option given but the cache."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, PreTrainedConfig, Qwen3Config

from kvquant import QuantizedCache
from kvquant.attention.counters import counters
from kvquant.attention.kernels import VARIABLE
from tests.support import SMALL_MODEL

pytest.importorskip("numba", reason="numba is not installed")

NEW_TOKENS = 12
PROMPT = 90

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL_MODEL),
    "mistral": MistralConfig(**SMALL_MODEL, sliding_window=None),
    "qwen3": Qwen3Config(**SMALL_MODEL),
    "phi3": Phi3Config(**SMALL_MODEL),
}

#: Mode of generation -> whether some prompts are padded on the left, and options of `generate`.
MODES = {
    "unpadded": (False, {"do_sample": False}),
    "left-padded": (True, {"do_sample": False}),
    "beam": (False, {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}),
    "beam, left-padded": (True, {"do_sample": False, "num_beams": 2}),
    "sampling": (False, {"do_sample": True, "top_k": 20, "num_return_sequences": 2}),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    """A small model of each family, with transformers' default attention."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    assert made.config._attn_implementation == "sdpa"
    return made


def generated(model, mode):
    """Generate, and return the tokens, the scores of each step, and the cache."""
    padded, options = MODES[mode]
    torch.manual_seed(1)
    ids = torch.randint(2, 128, (3, PROMPT))
    shown = torch.ones_like(ids)
    if padded:
        shown[0, :7], shown[2, :40] = 0, 0
        ids[shown == 0] = 1
    cache = QuantizedCache(backend="reference", nbits=4, group_size=16, residual_length=16, config=model.config)
    torch.manual_seed(2)
    counters.reset()
    made = model.generate(
        ids,
        attention_mask=shown,
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return made.sequences, torch.stack(made.logits), cache


@pytest.mark.parametrize("mode", MODES)
def test_every_decode_step_uses_the_kernel(model, mode, monkeypatch):
    """Once a layer and step, nothing is dequantised whole, and plain torch says the same."""
    monkeypatch.setenv(VARIABLE, "auto")
    tokens, logits, cache = generated(model, mode)
    steps = (NEW_TOKENS - 1) * model.config.num_hidden_layers
    assert (counters.kernels["numba"], counters.fused, counters.materialised) == (steps, steps, 0)
    assert cache.memory_report().attention == "numba"

    monkeypatch.setenv(VARIABLE, "torch")
    plain_tokens, plain_logits, _ = generated(model, mode)
    assert (counters.kernels["numba"], counters.fused) == (0, steps)
    assert torch.equal(tokens, plain_tokens)
    torch.testing.assert_close(logits, plain_logits, rtol=1e-4, atol=1e-4)

"""Models on two GPUs."""

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

from kvquant import QuantizedCache
from kvquant.demo import MODEL_DIR

# What a second device does is tried everywhere with pretended ones, in tests/unit/cache/test_devices.py.
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def spread(model, first):
    """Put the first layers on one GPU, and the others on the other; what is before and behind goes with them."""
    places = {f"model.layers.{at}": int(at >= first) for at in range(len(model.model.layers))}
    before = {"model.embed_tokens": 0, "model.rotary_emb": 0}
    return dispatch_model(model, {**before, **places, "model.norm": 1, "lm_head": 1})


@pytest.mark.parametrize("options", [{}, {"offload": True}, {"device": "cpu"}], ids=str)
def test_a_model_on_two_devices(options):
    """The same tokens as on one, each layer where its states are."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    prompt = torch.randint(3, 4000, (2, 400))
    said = []
    for first in (None, 2):
        model = model.cuda() if first is None else spread(model.cpu(), first)
        cache = QuantizedCache(nbits=8, config=model.config, **options)
        ids = prompt.to("cuda:0")
        mask = torch.ones_like(ids)
        said.append(model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=60).cpu())
    assert torch.equal(*said)
    assert [layer.device.index for layer in cache.layers] == [0, 0, *[1] * (len(cache.layers) - 2)]


def test_a_conversation_that_goes_on_elsewhere():
    """A cache moves with its model, a layer at a time, and says what one says that stayed."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).cuda(0).eval()
    first, more = torch.randint(3, 4000, (1, 400)), torch.randint(3, 4000, (1, 50))
    stays, moves = (QuantizedCache(nbits=8, config=model.config) for _ in range(2))
    options = {"max_new_tokens": 20, "do_sample": False}
    begun = [model.generate(first.cuda(0), past_key_values=cache, **options) for cache in (stays, moves)]
    asked = torch.cat([begun[0].cpu(), more], dim=1)
    stayed = model.generate(asked.cuda(0), past_key_values=stays, **options).cpu()
    moved = model.cuda(1).generate(asked.cuda(1), past_key_values=moves, **options).cpu()
    assert torch.equal(stayed, moved)
    assert {layer.device.index for layer in moves.layers} == {1}

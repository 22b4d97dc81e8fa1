"""Models that accelerate spreads over several places."""

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM, LlamaConfig

from kvquant import QuantizedCache
from tests.integration.processes import INPUTS, example
from tests.support import SMALL_MODEL


@pytest.mark.parametrize("options", [{}, {"offload": True}], ids=["", "offload"])
def test_weights_that_come_from_the_disk(tmp_path, options):
    """With hooks that bring each layer's weights and inputs to where it runs: the same tokens, the same cache."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_MODEL)).eval()
    ids = torch.randint(2, 128, (2, 50))
    caches, said = [], []
    for spread in (False, True):
        if spread:
            places = {name: "cpu" for name, _ in model.named_children()} | {"model.layers.1": "disk"}
            del places["model"]
            places |= {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
            places |= {"model.layers.0": "cpu"}
            model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
            assert next(model.model.layers[1].parameters()).device.type == "meta"
        caches.append(QuantizedCache(config=model.config, group_size=16, residual_length=16, **options))
        attention_mask = torch.ones_like(ids)
        said.append(
            model.generate(
                ids, attention_mask=attention_mask, past_key_values=caches[-1], max_new_tokens=20, do_sample=False
            )
        )
    assert torch.equal(*said)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert other.device == torch.device("cpu")
        assert torch.equal(one.keys, other.keys)


def test_the_page_s_examples(tmp_path, capsys):
    """docs/devices.md: an offloaded cache, and a model that accelerate places."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_MODEL)).eval()
    model.save_pretrained(tmp_path)
    plain = QuantizedCache(nbits=4, config=model.config)
    expected = model.generate(**INPUTS, past_key_values=plain, max_new_tokens=20)
    names = example("Host memory", model=model, inputs=INPUTS)
    assert torch.equal(names["ids"], expected)
    assert "scales" in capsys.readouterr().out
    names = example("A model over several GPUs", name=str(tmp_path), inputs=INPUTS, QuantizedCache=QuantizedCache)
    assert torch.equal(names["ids"], expected)

"""What each of two processes does in `test_processes`, started by torchrun: ``processes.py MODEL RESULTS``."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from kvquant import QuantizedCache

OPTIONS: dict[str, Any] = {"nbits": 4, "group_size": 16, "residual_length": 16, "sink_length": 2}
PROMPTS = torch.randint(2, 128, (3, 60), generator=torch.Generator().manual_seed(0))


def generate(model: PreTrainedModel, prompts: torch.Tensor, cache: QuantizedCache) -> list[list[int]]:
    """Return what a model says to prompts ``[batch, tokens]``."""
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 20, "do_sample": False}
    said: list[list[int]] = model.generate(prompts, past_key_values=cache, **options)[:, prompts.shape[1] :].tolist()
    return said


def held(cache: QuantizedCache) -> dict[str, int]:
    """Return what a cache holds."""
    store = cache.layers[0].stores[0]
    return {"heads": store.kv_heads, "quantised": len(store.body), "bytes": cache.nbytes}


def tensor_parallel(folder: str) -> list[dict[str, Any]]:
    """Share a model with the other process; caches made with its config, and without."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, distributed_config=DistributedConfig(tp_size=2)
    )
    caches = QuantizedCache(config=model.config, **OPTIONS), QuantizedCache(**OPTIONS)
    return [{"said": generate(model, PROMPTS, cache), **held(cache)} for cache in caches]


def data_parallel(folder: str) -> list[list[int]]:
    """Share the prompts with the other process, each with a cache of its own, and gather what was said."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with PartialState(cpu=True).split_between_processes(list(range(len(PROMPTS)))) as mine:
        said = [generate(model, PROMPTS[[number]], QuantizedCache(config=model.config, **OPTIONS)) for number in mine]
    gathered: list[list[int]] = gather_object([tokens for (tokens,) in said])
    return gathered


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"tensor parallel": tensor_parallel(sys.argv[1]), "data parallel": data_parallel(sys.argv[1])}
    Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()

"""What each of two processes does in `test_processes`, started by torchrun: ``processes.py MODEL RESULTS``."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from kvquant import QuantizedCache

PAGE = Path(__file__).parents[2] / "docs" / "devices.md"
OPTIONS: dict[str, Any] = {"nbits": 4, "group_size": 16, "residual_length": 16, "sink_length": 2}
#: Three prompts, long enough for the options of the page to quantise something.
PROMPTS = torch.randint(2, 128, (3, 200), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": PROMPTS, "attention_mask": torch.ones_like(PROMPTS)}


def example(section: str, **given: Any) -> dict[str, Any]:
    """Run the example of a section of the page, and return its names."""
    text = PAGE.read_text().split(f"## {section}\n")[1]
    (code, *_) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = dict(given)
    exec(compile(code, str(PAGE), "exec"), names)  # noqa: S102  # our own page
    return names


def held(cache: QuantizedCache) -> dict[str, int]:
    """Return what a cache holds."""
    store = cache.layers[0].stores[0]
    return {"heads": store.kv_heads, "quantised": len(store.body), "bytes": cache.nbytes}


def said(model: PreTrainedModel, cache: QuantizedCache) -> list[list[int]]:
    """Return what a model says to the prompts, with them."""
    tokens: list[list[int]] = model.generate(**INPUTS, past_key_values=cache, max_new_tokens=20).tolist()
    return tokens


def tensor_parallel(folder: str) -> list[dict[str, Any]]:
    """Share a model with the other process: as the page shows it, and with a cache that knows no config."""
    shown = example("Tensor parallel", name=folder, inputs=INPUTS)
    cache = QuantizedCache(**OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    return [
        {"said": shown["ids"].tolist(), **held(shown["cache"])},
        {"said": said(model, cache), **held(cache)},
    ]


def data_parallel(folder: str) -> list[list[int]]:
    """Share the prompts with the other process, as the page shows it."""
    gathered: list[list[int]] = example("Data parallel", name=folder, prompts=list(PROMPTS.split(1)))["said"]
    return gathered


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"tensor parallel": tensor_parallel(sys.argv[1]), "data parallel": data_parallel(sys.argv[1])}
    Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()

"""One model in two processes: each with half of its heads, or each with some of the prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from kvquant import QuantizedCache
from tests.integration import processes
from tests.integration.environment import ROOT
from tests.integration.processes import OPTIONS, PROMPTS, held, said
from tests.support import SMALL_MODEL


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """In float64, where sums in another order do not change a token."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_MODEL)).double().eval()


@pytest.fixture(scope="module")
def found(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command = [sys.executable, *launch.split(), str(Path(processes.__file__)), str(folder), str(folder)]
    alone = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        command, env={**os.environ, **alone}, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("at", [0, 1], ids=["as docs/devices.md shows it", "without the model's config"])
def test_tensor_parallel(found: list[dict[str, Any]], model: PreTrainedModel, at: int) -> None:
    """transformers' own: both say what one process says, and each holds, and quantises, half of the heads."""
    cache = [QuantizedCache(nbits=4, config=model.config), QuantizedCache(**OPTIONS)][at]
    tokens, whole = said(model, cache), held(cache)
    assert whole["quantised"] > 0
    half = {"heads": whole["heads"] // 2, "quantised": whole["quantised"], "bytes": whole["bytes"] // 2}
    assert [process["tensor parallel"][at] for process in found] == [{"said": tokens, **half}] * 2


def test_data_parallel(found: list[dict[str, Any]], model: PreTrainedModel) -> None:
    """accelerate's, as docs/devices.md shows it: what is gathered is what one process says to each prompt."""
    alone = [
        model.generate(prompt, past_key_values=QuantizedCache(nbits=4, config=model.config), max_new_tokens=20).tolist()
        for prompt in PROMPTS.split(1)
    ]
    assert [process["data parallel"] for process in found] == [alone] * 2

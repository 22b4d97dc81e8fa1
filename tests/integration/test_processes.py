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
from tests.integration.processes import OPTIONS, PROMPTS, generate, held
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
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_tensor_parallel(found: list[dict[str, Any]], model: PreTrainedModel) -> None:
    """transformers' own: both say what one process says, and each holds, and quantises, half of the heads."""
    cache = QuantizedCache(config=model.config, **OPTIONS)
    said, whole = generate(model, PROMPTS, cache), held(cache)
    assert whole["quantised"] > 0
    half = {"heads": whole["heads"] // 2, "quantised": whole["quantised"], "bytes": whole["bytes"] // 2}
    for process in found:
        assert process["tensor parallel"] == [{"said": said, **half}] * 2  # with the model's config, and without


def test_data_parallel(found: list[dict[str, Any]], model: PreTrainedModel) -> None:
    """accelerate's: what is gathered is what one process says to one prompt after the other."""
    said = [generate(model, prompt[None], QuantizedCache(config=model.config, **OPTIONS))[0] for prompt in PROMPTS]
    for process in found:
        assert process["data parallel"] == said

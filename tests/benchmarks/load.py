"""How long a saved cache takes to load, beside a prefill of a few tokens.

    python -m tests.benchmarks.load

The model has random weights and the shape of a real one; the cache has that model's layers and heads, and random
states, which is all that its size depends on. Loading and prefilling take turns within each round, in one process;
a ratio is of two times of the same round. "Cold" is a file that the system has been told to forget.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from kvquant import QuantizedCache
from kvquant.cli.console import machine_line
from kvquant.evaluation.measure import Spread, describe_machine, seconds

#: Layers, hidden size, intermediate size, heads, key/value heads, head_dim, vocabulary; from the models' own configs.
SHAPES = {
    "Qwen2.5-0.5B": (24, 896, 4864, 14, 2, 64, 151936),
    "Llama-3.2-1B": (16, 2048, 8192, 32, 8, 64, 128256),
    "shipped": (5, 256, 768, 4, 2, 64, 4096),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen2.5-0.5B", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=32768, help="of the cache")
    parser.add_argument("--prefill", type=int, default=100, help="tokens that are prefilled")
    parser.add_argument("--nbits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch's own choice if not given")
    return parser.parse_args()


def model_of(shape: str) -> PreTrainedModel:
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocabulary, tie_word_embeddings=True,
        max_position_embeddings=1 << 17,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def cache_of(model: PreTrainedModel, tokens: int, nbits: int) -> QuantizedCache:
    cache = QuantizedCache(config=model.config, nbits=nbits)
    shape = (1, model.config.num_key_value_heads, tokens, model.config.head_dim)
    generator = torch.Generator().manual_seed(0)
    for layer in range(len(cache.layers)):
        cache.update(*(torch.randn(shape, generator=generator) for _ in range(2)), layer)
    return cache


def saved(cache: QuantizedCache, path: Path, model: PreTrainedModel) -> float:
    """Save a cache and return the seconds that it took."""
    return seconds(lambda: cache.save(path, model=model), torch.device("cpu"))


def forget(path: Path) -> None:
    """Have the system drop what it holds of a file in memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measure and print."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    model = model_of(options.shape)
    ids = torch.randint(1000, (1, options.prefill))

    def prefill() -> None:
        with torch.inference_mode():
            model(ids, past_key_values=QuantizedCache(config=model.config, nbits=options.nbits), logits_to_keep=1)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.kvq"
        saving = saved(cache_of(model, options.tokens, options.nbits), path, model)
        loads: dict[str, Callable[[], object]] = {
            "load": lambda: QuantizedCache.load(path),
            "load, cold": lambda: QuantizedCache.load(path),
            "load, model compared": lambda: QuantizedCache.load(path, model=model),
            "load, no checksums": lambda: QuantizedCache.load(path, verify=False),
        }
        print(machine_line(describe_machine("cpu")))
        print(
            f"{options.shape}'s shape in float32; a cache of {options.tokens} tokens in {options.nbits} bits, "
            f"{path.stat().st_size / 1e6:.0f} MB, saved in {saving:.2f} s; {options.rounds} rounds"
        )
        prefill()
        times: dict[str, list[float]] = {name: [] for name in ("prefill", *loads)}
        for _ in range(options.rounds):
            gc.collect()
            times["prefill"].append(seconds(prefill, cpu))
            for name, load in loads.items():
                if name == "load, cold":
                    forget(path)
                times[name].append(seconds(load, cpu))
    base = Spread.of(times["prefill"])
    print(f"prefill of {options.prefill} tokens: {base.median:.3f} s ({base.low:.3f} to {base.high:.3f})")
    for name in loads:
        one = Spread.of(times[name])
        ratio = Spread.of([mine / theirs for mine, theirs in zip(times[name], times["prefill"], strict=True)])
        print(
            f"{name:22} {one.median:.3f} s ({one.low:.3f} to {one.high:.3f}), "
            f"{ratio.median:.2f} of the prefill ({ratio.low:.2f} to {ratio.high:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()

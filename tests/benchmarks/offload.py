"""Where caches lie, and what a step takes, with host memory and without: beside transformers' own offloading.

    python -m tests.benchmarks.offload --tokens 32768

The model has random weights and the shape of a real one. Each cache gets random states for its prompt, so that nothing
is measured but the steps after it. Caches take turns within each round. "on the device" is the most that a step has
there at once, the model's weights not counted; torch tells it of CUDA alone, and elsewhere it is what the cache holds
there after a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from kvquant import QuantizedCache
from kvquant.cache.compat import given
from kvquant.cache.layers import memory_of
from kvquant.cli.console import machine_line
from kvquant.engine.memory import format_bytes
from kvquant.evaluation.measure import Spread, describe_machine, seconds
from tests.benchmarks.load import SHAPES, model_of


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen2.5-0.5B", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt")
    parser.add_argument("--nbits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10, help="steps of each cache that are timed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def makers(model: PreTrainedModel, nbits: int) -> dict[str, Callable[[], Cache]]:
    """Return what makes each cache; transformers' offloading needs CUDA."""
    config = model.config
    made: dict[str, Callable[[], Cache]] = {
        "dynamic": lambda: DynamicCache(config=config),
        f"kvquant, {nbits} bits": lambda: QuantizedCache(nbits=nbits, config=config),
        f"kvquant, {nbits} bits, offloaded": lambda: QuantizedCache(nbits=nbits, config=config, offload=True),
    }
    if model.device.type == "cuda":
        made["dynamic, offloaded"] = lambda: DynamicCache(config=config, offloading=True)
    return made


def fill(cache: Cache, model: PreTrainedModel, tokens: int) -> None:
    shape = (1, model.config.num_key_value_heads, tokens, model.config.head_dim)
    made = {"device": model.device, "dtype": model.dtype}
    for layer in range(model.config.num_hidden_layers):
        cache.update(torch.randn(shape, **made), torch.randn(shape, **made), layer)


def held(cache: Cache) -> dict[str, int]:
    """Return the bytes of a cache by device."""
    sizes: dict[str, int] = {}
    for index, layer in enumerate(cache.layers):
        for device, size in memory_of(index, layer).devices.items():
            sizes[device] = sizes.get(device, 0) + size
    return sizes


def main() -> None:
    """Measure and print."""
    options = arguments()
    device = torch.device(options.device)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = model_of(options.shape).to(device, dtype)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    caches: dict[str, Cache] = {}
    peaks: dict[str, int] = {}
    times: dict[str, list[float]] = {}

    @torch.inference_mode()
    def step(cache: Cache) -> None:
        model(token, **given(model, cache))

    print(machine_line(describe_machine(device.type)))
    print(f"{options.shape}'s shape in {str(dtype)[6:]}, {options.tokens} tokens, {options.rounds} steps of each cache")
    for name, make in makers(model, options.nbits).items():
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        caches[name], times[name] = make(), []
        with torch.inference_mode():
            fill(caches[name], model, options.tokens)
        for _ in range(2):  # the second step is the first that knows the order of the layers
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            step(caches[name])
        if device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated(device) - before
        else:
            peaks[name] = held(caches[name])[str(device)]
    for _ in range(options.rounds):
        for name, cache in caches.items():
            times[name].append(seconds(lambda cache=cache: step(cache), device))
    for name, cache in caches.items():
        spread = Spread.of(times[name])
        host = sum(size for place, size in held(cache).items() if torch.device(place).type == "cpu")
        print(
            f"{name:28} {1e3 * spread.median:8.1f} ms a step ({1e3 * spread.low:.1f} to {1e3 * spread.high:.1f}), "
            f"{format_bytes(peaks[name]):>10} on the device, {format_bytes(host):>10} in host memory",
            flush=True,
        )


if __name__ == "__main__":
    main()

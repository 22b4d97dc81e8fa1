"""What a compiled decoding step takes, beside an eager one.

    python -m tests.benchmarks.compile

The model has random weights and the shape of a real one, the caches random states. All contenders take turns within
each round, a step each, in one process; a ratio is of two times of the same round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache

from kvquant import QuantizedCache
from kvquant.cli.console import machine_line
from kvquant.evaluation.measure import Spread, describe_machine, timed
from tests.benchmarks.load import SHAPES, model_of

#: Steps before the first that counts: torch compiles in the first.
WARM = 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="Qwen2.5-0.5B", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=2048, help="in the cache")
    parser.add_argument("--nbits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, help="torch's own choice if not given")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = model_of(options.shape)
    room = options.tokens + options.rounds + WARM
    compiled = torch.compile(model.forward, fullgraph=True)
    fixed: dict[str, Any] = {"config": model.config, "max_cache_len": room}
    contenders: dict[str, tuple[Cache, Callable[..., Any]]] = {
        "kvquant": (QuantizedCache(config=model.config, nbits=options.nbits), model.forward),
        "kvquant, fixed size": (QuantizedCache(**fixed, nbits=options.nbits), model.forward),
        "kvquant, compiled": (QuantizedCache(**fixed, nbits=options.nbits), compiled),
        "DynamicCache": (DynamicCache(config=model.config), model.forward),
        "StaticCache, compiled": (StaticCache(**fixed), compiled),
    }
    print(machine_line(describe_machine("cpu")))
    print(f"{options.shape}'s shape in float32, {options.tokens} tokens, {options.nbits} bits, {options.rounds} rounds")
    with torch.inference_mode():
        shape = (1, model.config.num_key_value_heads, options.tokens, model.config.head_dim)
        for layer in range(model.config.num_hidden_layers):
            states = torch.randn(shape), torch.randn(shape)
            for cache, _ in contenders.values():
                cache.update(*states, layer)
        ids, times = torch.tensor([[1]]), {name: list[float]() for name in contenders}
        for at in range(-WARM, options.rounds):
            for name, (cache, forward) in contenders.items():
                _, took = timed(partial(forward, ids, None, None, cache), torch.device("cpu"))
                if at >= 0:
                    times[name].append(took)
    for name, mine in times.items():
        one = Spread.of(mine)
        ratio = Spread.of([own / base for own, base in zip(mine, times["kvquant"], strict=True)])
        print(f"{name:22} {one.median * 1e3:7.2f} ms a step, {ratio.median:.2f} of kvquant's eager step", flush=True)


if __name__ == "__main__":
    main()

"""How much faster a prefill is quantised through the cache than by giving hqq the whole tensors at once.

    python -m tests.benchmarks.hqq_prefill

Both refine (``optimize`` on). Ours is the whole way: one `update` of a layer with keys and values, chunks, checks and
packing included. hqq's is `Quantizer.quantize` of the keys and then of the values, packing included, as transformers
calls it. They take turns within each round, in one process, and a ratio is of two times of the same round.
"""

from __future__ import annotations

import argparse
import importlib.metadata

import torch
from torch import Tensor

from kvquant import QuantizedCache
from kvquant.cli.console import machine_line
from kvquant.evaluation.measure import Spread, describe_machine, seconds

WIDTHS = (1, 2, 3, 4, 8)
#: Our axes, and what transformers calls them.
AXES = {"channel": 0, "token": 1}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nbits", type=int, nargs="+", default=WIDTHS, choices=WIDTHS)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--deviation", type=float, default=1.0, help="of the states, which are Gaussian")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch's own choice if not given")
    return parser.parse_args()


def through_the_cache(keys: Tensor, values: Tensor, nbits: int, axis: str) -> None:
    cache = QuantizedCache("hqq", nbits=nbits, axis_key=axis, axis_value=axis, group_size=64, residual_length=0)
    cache.update(keys, values, 0)


def through_the_library(keys: Tensor, values: Tensor, nbits: int, axis: str) -> None:
    from hqq.core.quantize import Quantizer

    for states in (keys, values):
        Quantizer.quantize(
            states, nbits=nbits, axis=AXES[axis], group_size=64, device="cpu", compute_dtype=states.dtype
        )


def main() -> None:
    """Measure and print."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    shape = (1, options.heads, options.tokens, options.head_dim)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(shape, generator=generator) * options.deviation for _ in range(2))
    small = keys[:, :, :64], values[:, :, :64]

    print(machine_line(describe_machine("cpu")) + f", hqq {importlib.metadata.version('hqq')}")
    print(
        f"keys and values {list(shape)} float32, deviation {options.deviation}, groups of 64, {options.rounds} rounds"
    )
    print("nbits  axis      hqq s   cache s   hqq / cache (lowest to highest)")
    for nbits in options.nbits:
        for axis in AXES:
            through_the_cache(*small, nbits, axis)
            through_the_library(*small, nbits, axis)
            pairs = [
                (
                    seconds(lambda n=nbits, a=axis: through_the_library(keys, values, n, a), device),
                    seconds(lambda n=nbits, a=axis: through_the_cache(keys, values, n, a), device),
                )
                for _ in range(options.rounds)
            ]
            library, cache = (Spread.of(times) for times in zip(*pairs, strict=True))
            ratio = Spread.of([theirs / ours for theirs, ours in pairs])
            print(
                f"{nbits:5}  {axis:8} {library.median:6.2f}  {cache.median:8.3f}   "
                f"{ratio.median:5.1f} ({ratio.low:.1f} to {ratio.high:.1f})",
                flush=True,
            )


if __name__ == "__main__":
    main()

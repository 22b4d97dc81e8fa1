"""How often assisted decoding gives the text of plain greedy decoding, with the same cache.

    python -m tests.benchmarks.assisted

The shipped model goes on from prompts of its held-out text, with and without prompt lookup: over a `DynamicCache` and
over quantised ones whose window is so short that blocks leave it while candidates are verified. What differs for a
`DynamicCache` is rounding: several tokens at once are multiplied in another order than one at a time.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import Cache, DynamicCache

from kvquant import QuantizedCache
from kvquant.cache.compat import given
from kvquant.cli.console import machine_line
from kvquant.demo import HELDOUT_FILE
from kvquant.evaluation.loading import load_model
from kvquant.evaluation.measure import describe_machine

#: Tokens between the beginnings of two prompts.
APART = 1500


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=300, help="of a prompt")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=5, help="that prompt lookup proposes at a time, at most")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


def main() -> None:
    """Generate, compare and print."""
    options = arguments()
    torch.set_num_threads(1)
    loaded = load_model(dtype=options.dtype)
    model, text = loaded.model, loaded.encode(HELDOUT_FILE.read_text("utf-8"))
    most = 1 + (len(text) - options.tokens) // APART
    if not 1 <= options.prompts <= most:
        raise SystemExit(f"--prompts {options.prompts} cannot work: expected 1 to {most}, which the text has room for")
    prompts = [torch.tensor([text[at * APART :][: options.tokens]]) for at in range(options.prompts)]

    def new(bits: int | None) -> Cache:
        if bits is None:
            return DynamicCache(config=model.config)
        return QuantizedCache(nbits=bits, group_size=32, residual_length=32, config=model.config)

    def generated(prompt: torch.Tensor, bits: int | None, **assistance: Any) -> torch.Tensor:
        length = {"min_new_tokens": options.new_tokens, "max_new_tokens": options.new_tokens}
        mask = torch.ones_like(prompt)
        asked = {**given(model, new(bits)), **length, **assistance}
        tokens: torch.Tensor = model.generate(prompt, attention_mask=mask, do_sample=False, **asked)
        return tokens

    print(machine_line(describe_machine("cpu")))
    print(f"{loaded.title}, {options.dtype}, {options.candidates} candidates, {options.new_tokens} new tokens")
    for bits in (None, *options.bits):
        same = sum(
            torch.equal(generated(one, bits), generated(one, bits, prompt_lookup_num_tokens=options.candidates))
            for one in prompts
        )
        name = "DynamicCache" if bits is None else f"reference, {bits} bits"
        print(f"{name:18} {same} of {len(prompts)} texts are the same to the last token", flush=True)


if __name__ == "__main__":
    main()

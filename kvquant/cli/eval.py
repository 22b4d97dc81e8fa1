"""`kvquant eval`: what quantised caches keep, measured on a model. Each measure is a command in a file of its own."""

from __future__ import annotations

import click

from kvquant.cli.lazy import LazyGroup, Place

#: Command -> its module, its object there, and its line in the list of commands.
EVALUATIONS: dict[str, Place] = {
    "perplexity": (
        "kvquant.cli.eval_perplexity",
        "perplexity",
        "Perplexity, KL divergence and agreement through the cache.",
    ),
    "attention": (
        "kvquant.cli.eval_attention",
        "attention",
        "Error of attention's output, layer by layer, on recorded states.",
    ),
    "needle": (
        "kvquant.cli.eval_needle",
        "needle",
        "Whether a key in a long text is found again, by length and depth.",
    ),
    "longbench": ("kvquant.cli.eval_longbench", "longbench", "The English tasks of LongBench, by its own protocol."),
}


@click.group("eval", cls=LazyGroup, places=EVALUATIONS)
def evaluate() -> None:
    """Measure what quantised caches keep, beside the full-precision one.

    Every measure runs on any transformers model (--model), without one on the small model that kvquant ships, and
    compares any caches (--backends). With --output FILE.jsonl an interrupted run goes on where it stopped.
    """

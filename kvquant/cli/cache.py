"""`kvquant cache`: caches in files. Each command is in a file of its own."""

from __future__ import annotations

import click

from kvquant.cli.lazy import LazyGroup, Place

#: Command -> its module, its object there, and its line in the list of commands.
CACHE_COMMANDS: dict[str, Place] = {
    "prefill": ("kvquant.cli.cache_prefill", "prefill", "Run a text through a model once, and save the cache."),
    "info": ("kvquant.cli.cache_info", "info", "Show what a saved cache is, from its header alone."),
    "verify": ("kvquant.cli.cache_verify", "verify", "Check that a saved cache is whole, and of a model."),
}


@click.group("cache", cls=LazyGroup, places=CACHE_COMMANDS)
def cache() -> None:
    """Save the cache of a long prompt once, and start from it ever after.

    In Python: QuantizedCache.load("prompt.kvq", model=model) and generate as usual.
    """

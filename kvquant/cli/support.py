"""`kvquant support`: what works, found out by running it. Each command is in a file of its own."""

from __future__ import annotations

import click

from kvquant.cli.lazy import LazyGroup, Place

#: Command -> its module, its object there, and its line in the list of commands.
SUPPORT: dict[str, Place] = {
    "families": ("kvquant.cli.support_families", "families", "Run a tiny model of every family through the cache."),
    "modes": ("kvquant.cli.support_modes", "modes", "Run every way of generating through the cache."),
    "model": ("kvquant.cli.support_model", "model", "Run the same checks on a model of your own."),
}


@click.group("support", cls=LazyGroup, places=SUPPORT)
def support() -> None:
    """Say which models and ways of generating work with a quantised cache, by running them.

    Nothing is looked up in a list: every answer comes from the libraries that are installed here.
    """

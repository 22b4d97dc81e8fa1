"""The command ``kvquant``: finds commands by name and imports each when it runs, so that every answer is quick.

Exit codes: 0 fine, 1 the thing asked for failed, 2 bad usage.
"""

from __future__ import annotations

import os
from typing import Any

import click

from kvquant._version import __version__
from kvquant.cli.lazy import LazyGroup
from kvquant.errors import ConfigError, KVQuantError

#: Command -> its module, its object there, and its line in the list of commands.
COMMANDS = {
    "list-backends": ("kvquant.cli.list_backends", "list_backends", "List the backends that are installed."),
    "list-transforms": ("kvquant.cli.list_transforms", "list_transforms", "List the transforms that are installed."),
    "info": ("kvquant.cli.info", "info", "Show everything about one backend or transform."),
    "new-plugin": ("kvquant.cli.new_plugin", "new_plugin", "Write a new plugin project to start from."),
    "check-plugin": (
        "kvquant.cli.check_plugin",
        "check_plugin",
        "Check a backend or transform against the plugin contract.",
    ),
    "compare-backends": (
        "kvquant.cli.compare_backends",
        "compare_backends",
        "Compare backends on the same states: bits, error, speed.",
    ),
    "rate-distortion": (
        "kvquant.cli.rate_distortion",
        "rate_distortion",
        "Measure error against bits, beside Shannon's bound.",
    ),
    "demo": ("kvquant.cli.demo", "demo", "Generate text with a quantised cache, beside the full-precision one."),
    "eval": (
        "kvquant.cli.eval",
        "evaluate",
        "Measure what quantised caches keep: perplexity, attention, needle, LongBench.",
    ),
    "bench": ("kvquant.cli.bench", "bench", "Time caches side by side, and measure their memory."),
    "plan": ("kvquant.cli.plan", "plan", "Say what a cache will take, and what fits, from a model's config alone."),
    "tune": ("kvquant.cli.tune", "tune", "Choose the bits of each layer, best under a budget, and write a config."),
    "cache": ("kvquant.cli.cache", "cache", "Save the cache of a long prompt, look at it, check it."),
    "support": ("kvquant.cli.support", "support", "Say which models and ways of generating work, by running them."),
    "report": ("kvquant.cli.report", "report", "Put what was measured on one HTML page."),
}


class Main(LazyGroup):
    """All commands."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command: errors that kvquant raises on purpose become one message and an exit code.

        With ``KVQUANT_DEBUG`` in the environment they pass, for the traceback.
        """
        try:
            return super().invoke(ctx)
        except KVQuantError as error:
            if os.environ.get("KVQUANT_DEBUG", "0") not in ("", "0"):
                raise
            click.echo(f"{click.style('Error:', fg='red', bold=True)} {error}", err=True)
            # An option that can never work is bad usage, wherever it was noticed.
            ctx.exit(2 if isinstance(error, ConfigError) else 1)


@click.group(cls=Main, places=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvquant", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Keep a language model's key/value cache in 1 to 8 bits."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False


def main() -> None:
    """Run the command line and exit."""
    cli(prog_name="kvquant")

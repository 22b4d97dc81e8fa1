"""Groups of commands that are imported when they run, so that every answer is quick."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

#: A command's module, its object there, and its line in the list of commands.
Place = tuple[str, str, str]


class LazyGroup(click.Group):
    """A group whose commands are imported when they run, not when they are listed."""

    def __init__(self, *arguments: Any, places: Mapping[str, Place], **options: Any) -> None:
        """Make a group.

        Args:
            arguments: those of `click.Group`.
            places: command -> where it is.
            options: those of `click.Group`.
        """
        super().__init__(*arguments, **options)
        self._places = places

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 # click's signature
        """Return the names of all commands."""
        return list(self._places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 # click's signature
        """Import and return a command, or None if there is none of that name."""
        if cmd_name not in self._places:
            return None
        module, attribute, _ = self._places[cmd_name]
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 # as above
        """Write the list of commands without importing them."""
        if self._places:
            with formatter.section("Commands"):
                formatter.write_dl([(name, line) for name, (_, _, line) in self._places.items()])

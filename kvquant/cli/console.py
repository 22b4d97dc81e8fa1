"""The console that commands print to, and the progress bar they show while they work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

#: Columns for tables that go to a file or a pipe, which have no width of their own.
PIPE_WIDTH = 160


def console() -> Console:
    """Return a console on standard output."""
    from rich.console import Console

    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=max(terminal.width, PIPE_WIDTH))


@contextlib.contextmanager
def progress_bar(title: str, total: float, *, quiet: bool = False) -> Iterator[Callable[[float], None]]:
    """Show a bar with the time left while the block runs, on standard error and only if that is a terminal.

    Args:
        title: what is going on.
        total: steps in all.
        quiet: show nothing.

    Yields:
        A function to call with the number of steps done since the last call.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=quiet or not screen.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda steps: bar.advance(task, steps)

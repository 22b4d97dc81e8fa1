"""The console that commands print to, and the progress bar they show while they work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from kvquant.evaluation.intervals import Estimate

#: Columns for tables that go to a file or a pipe, which have no width of their own.
PIPE_WIDTH = 160

_LIBRARIES = ("optimum-quanto", "hqq", "bitsandbytes", "turboquant", "numpy")


def console(pipe_width: int = PIPE_WIDTH) -> Console:
    """Return a console on standard output, `pipe_width` columns wide where that is no terminal."""
    from rich.console import Console

    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=pipe_width)


def machine_line(machine: dict[str, Any]) -> str:
    """Return what figures depend on, on one line; see `kvquant.evaluation.measure.describe_machine`."""
    libraries = "".join(f"{name} {machine[name]}, " for name in _LIBRARIES if name in machine)
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, load {machine['load']}, "
        f"on {machine['device']}; torch {machine['torch']}, transformers {machine['transformers']}, "
        f"{libraries}"
        f"kvquant {machine['kvquant']}, Python {machine['python']}"
    )


def interval_text(estimate: Estimate, form: str, factor: float = 1) -> str:
    """Return ``value (low, high)``, or the value alone where there is no interval.

    Args:
        estimate: a figure and its confidence interval.
        form: how each number is written, such as ``"{:+.3f}"``.
        factor: what numbers are multiplied by, such as 100 for per cent.
    """
    value = form.format(factor * estimate.value)
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ({form.format(factor * estimate.low)}, {form.format(factor * estimate.high)})"


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

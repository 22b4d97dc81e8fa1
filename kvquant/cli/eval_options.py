"""The options that all evaluations share, and what is made of them."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from kvquant.evaluation.candidates import Candidate

F = TypeVar("F", bound=Callable[..., Any])

#: What is compared where nobody says what.
DEFAULT_BACKENDS = "reference:8:4:2,transformers:quanto:4:2"
#: Options of kvquant's caches that one may want to set for all of them, `CacheConfig`'s names.
SHARED = ("group_size", "residual_length", "sink_length", "axis_key", "axis_value")
_AXIS = click.Choice(["channel", "token"])


def bits(text: object) -> float:
    """Read the bits of a code, such as 4 or 2.5: a type for click's options.

    Raises:
        click.BadParameter: it is no number of bits.
    """
    from kvquant.engine.typed import parse_width

    try:
        return parse_width(str(text))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a number of bits such as 4 or 2.5") from None


def loading_options(command: F) -> F:
    """Add ``--device`` and ``--dtype``."""
    return _with(
        command,
        click.option("--device", default="cpu", show_default=True, help="Device of the model, such as cuda."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16", "float64"]),
            default="float32",
            show_default=True,
            help="Type of the weights; auto takes the one that they are saved in.",
        ),
    )


def model_options(command: F) -> F:
    """Add ``--model``, ``--device``, ``--dtype``, ``--outliers`` and ``--threads``."""
    return _with(
        command,
        click.option("--model", metavar="NAME_OR_PATH", help="Any transformers causal model [default: shipped]."),
        loading_options,
        click.option(
            "--outliers",
            type=int,
            metavar="FACTOR",
            help="Evaluate the model's outlier twin: some key channels 16 to FACTOR times larger, as large models "
            "have them, and the matching queries smaller, which changes nothing in full precision.",
        ),
        click.option("--threads", type=click.IntRange(min=1), help="torch's threads."),
    )


def cache_options(command: F) -> F:
    """Add ``--backends`` and the options that hold for all of kvquant's caches."""
    return _with(
        command,
        click.option(
            "--backends",
            metavar="LIST",
            help="Caches to compare with full precision, separated by commas: BACKEND[:NBITS...][:AXIS]"
            "[:OPTION=VALUE...] with any backend and option of kvquant, a preset such as kivi-2, or transformers' own "
            "as transformers:quanto:4. For example reference:8:4:2,hqq:2:group_size=32,reference:2:axis_key=token."
            f"  [default: {DEFAULT_BACKENDS}, as far as they are installed]",
        ),
        setting_options,
    )


def setting_options(command: F) -> F:
    """Add the options of `SHARED`, which hold for all of kvquant's caches."""
    return _with(
        command,
        click.option("--group-size", type=int, help="Numbers that share a scale, for all of kvquant's caches."),
        click.option("--residual-length", type=int, help="Recent tokens in full precision, likewise."),
        click.option("--sink-length", type=int, help="First tokens in full precision, likewise."),
        click.option("--axis-key", type=_AXIS, help="What shares a scale in keys, likewise."),
        click.option("--axis-value", type=_AXIS, help="What shares a scale in values, likewise."),
    )


def run_options(command: F) -> F:
    """Add ``--seed``, ``--output``, ``--plot`` and ``--json``."""
    return _with(
        command,
        click.option(
            "--seed",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Seed of everything that is drawn.",
        ),
        click.option(
            "--output",
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE.jsonl",
            help="Record of finished parts. Where it exists, the run goes on there.",
        ),
        click.option(
            "--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw the result."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead."),
    )


def _with(command: F, *options: Callable[[F], F]) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def model(chosen: dict[str, Any]) -> dict[str, Any]:
    """Take what `load_model` wants out of the options chosen; the seed stays there too.

    Raises:
        OptionValueError: there is no such device.
    """
    from kvquant.engine.config import device_name

    device_name(chosen["device"])
    options = {name: chosen.pop(name) for name in ("device", "dtype", "outliers")}
    return {"name": chosen.pop("model"), "seed": chosen["seed"], **options}


def candidates(chosen: dict[str, Any]) -> tuple[tuple[Candidate, ...], list[str]]:
    """Take the caches out of the options chosen; say what is left out of those that nobody asked for by name.

    Raises:
        ConfigError, BackendError: a cache that is asked for cannot be made.
    """
    from kvquant.evaluation.candidates import parse_candidates, usable_candidates

    backends, shared = chosen.pop("backends"), {name: chosen.pop(name) for name in SHARED}
    with results_only():
        if backends is None:
            return usable_candidates(DEFAULT_BACKENDS, shared)
        return parse_candidates(backends, shared), []


def read_text(option: str, path: Path) -> str:
    """Return what is in a text file.

    Raises:
        OptionValueError: it cannot be read, or is no UTF-8.
    """
    from kvquant.errors import OptionValueError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise OptionValueError(option, str(path), f"a text in UTF-8 that can be read ({cause})") from cause


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """Send what libraries print on standard error: standard output is the result's."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def interruptible(command: F) -> F:
    """Say at Ctrl-C what becomes of finished parts: they are kept where there is an ``--output``."""

    @functools.wraps(command)
    def told(*arguments: Any, output: Path | None, **chosen: Any) -> Any:
        try:
            return command(*arguments, output=output, **chosen)
        except KeyboardInterrupt:
            where = (
                f"Finished parts are kept in {output}; the same command goes on there."
                if output
                else ("Nothing is kept; with --output FILE.jsonl finished parts would be.")
            )
            click.echo(f"\n{where}", err=True)
            raise

    return told  # type: ignore[return-value]

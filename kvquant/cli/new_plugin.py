"""``kvquant new-plugin NAME``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from kvquant.scaffold import FORMATS, new_project


@click.command("new-plugin")
@click.argument("name")
@click.option(
    "--format", "format_", type=click.Choice(FORMATS), default="affine", show_default=True, help="What to start from."
)
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    show_default=True,
    help="Folder to make the project's folder in.",
)
@click.option("--author", default="", metavar="TEXT", help='"A Name" or "A Name <name@example.org>".')
def new_plugin(name: str, format_: str, directory: Path, author: str) -> None:
    """Write a small project kvquant-plugin-NAME with a backend that works, to be changed into your own.

    \b
    The quantiser to start from, by its format:
      affine    codes * scale + offset: even steps over a searched range
      codebook  table[codes] * scale: levels that stand closer together near zero
      opaque    a form of its own: even steps, with outliers kept apart
    """  # noqa: D301 # click keeps the lines after this character as they are
    folder, *files = new_project(name, directory, format_, author)
    click.echo(f"Wrote {folder}:")
    for path in files:
        click.echo(f"  {path.relative_to(folder).as_posix()}")
    click.echo("\nNext steps:")
    for command in (
        f"cd {shlex.quote(str(folder))}",
        "pip install -e '.[test]'",
        "pytest",
        f"kvquant check-plugin {name}",
        "kvquant list-backends",
    ):
        click.echo(f"  {command}")
    (quantizer,) = (path for path in files if path.name == "quantizer.py")
    click.echo(f"\nThe method is in {quantizer.relative_to(folder).as_posix()}: put yours in its place.")

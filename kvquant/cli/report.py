"""`kvquant report`: one page of all that was measured."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE.json [FILE.json ...]",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    default=Path("report.html"),
    show_default=True,
    help="The page. One that is there already is replaced.",
)
@click.option("--title", help="Title of the page.")
def report(files: tuple[Path, ...], output: Path, title: str | None) -> None:
    """Put what was measured on one HTML page, with everything in it: tables, pictures, settings.

    The files are what other commands print with --json, in any number and order:

    \b
      kvquant eval perplexity --json > perplexity.json
      kvquant eval needle --json > needle.json
      kvquant eval longbench --data DIR --json > longbench.json
      kvquant eval attention --json > attention.json
      kvquant rate-distortion --json > rate-distortion.json
      kvquant bench --json > bench.json
      kvquant plan --json > plan.json
      kvquant tune --budget 2.5 --json > tune.json
      kvquant report *.json --output report.html

    On top stands a table of what each cache loses and gains, joined from all of them; a section for each measurement
    follows. Measurements of several models, or of a model and its outlier twin, stand side by side. Files that
    measured the same of other caches are put together.
    """  # noqa: D301 # click wants the control character
    from kvquant._version import __version__
    from kvquant.evaluation.page import TITLE, check_output, make_page, require_libraries, write_page
    from kvquant.evaluation.reports import read_report

    check_output(output)
    _check_once(files)
    require_libraries()
    read = [read_report(path) for path in files]
    for file in read:
        if file.version != __version__:
            click.echo(f"{file.name} was measured by kvquant {file.version}; this is kvquant {__version__}.", err=True)
    write_page(make_page(read, title or TITLE), output)
    click.echo(f"Wrote {output}", err=True)


def _check_once(files: tuple[Path, ...]) -> None:
    """Refuse a file that is given twice.

    Raises:
        OptionValueError: one is.
    """
    from kvquant.errors import OptionValueError

    known: set[Path] = set()
    for path in files:
        if path.resolve() in known:
            raise OptionValueError("files", str(path), "each file once")
        known.add(path.resolve())

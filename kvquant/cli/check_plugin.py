"""``kvquant check-plugin NAME``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from kvquant.cli.console import console, progress_bar
from kvquant.cli.describe import clean, kind_of, kind_option, quietly
from kvquant.errors import listing, origin
from kvquant.testing.outcomes import TransformReport

if TYPE_CHECKING:
    from kvquant.testing import Report

_STYLES = {"passed": "green", "failed": "red", "not applicable": "dim"}


@click.command("check-plugin")
@click.argument("name")
@kind_option
@click.option("--nbits", metavar="N[,N...]", help="Widths to check.  [default: all that the backend declares]")
@click.option(
    "--option",
    "options",
    metavar="NAME=VALUE",
    multiple=True,
    help="An option of the backend to check it with; may be given again.",
)
@click.option("--check", "checks", metavar="CHECK", multiple=True, help="Run this check only; may be given again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
@click.pass_context
def check_plugin(
    ctx: click.Context,
    name: str,
    kind: str | None,
    nbits: str | None,
    options: tuple[str, ...],
    checks: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check the backend or transform NAME against the plugin contract: what it returns, how well, what it imports.

    Exit code 1 if a check fails. Where several distributions have one of that name, NAME is "distribution:name".
    """
    report: Report | TransformReport
    if (kind or kind_of(name)) == "transform":
        if nbits is not None or options:
            raise click.UsageError("--nbits and --option are for backends; a transform has none.")
        report = _transform_report(name, checks, quiet=as_json)
    else:
        report = _backend_report(name, nbits, options, checks, quiet=as_json)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2, default=str))
    else:
        _show(report)
    if not report.ok:
        ctx.exit(1)


def _backend_report(
    name: str, nbits: str | None, options: tuple[str, ...], checks: tuple[str, ...], *, quiet: bool
) -> Report:
    from kvquant.engine.typed import parse_options, parse_widths
    from kvquant.testing import check_backend
    from kvquant.testing.checks import CHECKS

    widths, chosen = parse_widths(nbits), parse_options(options)
    with progress_bar(f"checking {clean(name)}", len(CHECKS), quiet=quiet) as advance:
        return quietly(
            lambda: check_backend(
                name, nbits=widths, options=chosen, checks=checks or None, progress=lambda _: advance(1)
            )
        )


def _transform_report(name: str, checks: tuple[str, ...], *, quiet: bool) -> TransformReport:
    from kvquant.testing import check_transform
    from kvquant.testing.transforms.checks import CHECKS

    with progress_bar(f"checking {clean(name)}", len(CHECKS), quiet=quiet) as advance:
        return quietly(lambda: check_transform(name, checks=checks or None, progress=lambda _: advance(1)))


def _title(report: Report | TransformReport) -> str:
    origin_text = clean(origin(report.distribution, report.version))
    if isinstance(report, TransformReport):
        return f"{clean(report.transform)}, from {origin_text}, for heads of {listing(report.head_dims)}"
    chosen = "".join(f", {option}={value}" for option, value in report.options.items())
    return f"{clean(report.backend)}, from {origin_text}, at {listing(report.nbits)} bits{clean(chosen)}"


def _show(report: Report | TransformReport) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console(pipe_width=140)
    out.print(_title(report), markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("check", "result", "what it demands"):
        table.add_column(heading, no_wrap=heading != "what it demands", overflow="fold")
    for outcome in report.outcomes:
        style = _STYLES[outcome.status]
        # A reason may hold a plugin's own words.
        reason = f"\n[{style}]→ {escape(clean(outcome.reason))}[/]" if outcome.reason else ""
        table.add_row(outcome.check, f"[{style}]{outcome.status}[/]", escape(outcome.title) + reason)
    out.print(table)
    counts = {status: sum(outcome.status == status for outcome in report.outcomes) for status in _STYLES}
    out.print(", ".join(f"{count} {status}" for status, count in counts.items()), style="bold" if report.ok else "red")

"""What a page shows of `kvquant rate-distortion`."""

from __future__ import annotations

from typing import Any

from kvquant.evaluation.figures.rate_distortion import STATES, STREAMS
from kvquant.evaluation.page.commands import cache_options, settings_of
from kvquant.evaluation.page.parts import Column, Group, Table, listing, number, shortened
from kvquant.evaluation.rate_distortion import RateDistortionReport, RateDistortionRow
from kvquant.evaluation.reports import ReportFile

TITLE = "Rate and distortion"

_LEAD = (
    "Synthetic states [1, {heads}, {tokens}, {head_dim}] go through a cache. Error is squared error over variance; bits"
    " per element count codes, scales, offsets and tables of what is quantised. Shannon's bound is the least number of "
    "bits with which an error is possible, by any code whatever: the gap is what a cache takes above it."
)


def lead(report: RateDistortionReport) -> tuple[str, ...]:
    """Return what was measured."""
    settings = report.settings
    return (_LEAD.format(**{name: settings[name] for name in ("heads", "tokens", "head_dim")}),)


def tables(report: RateDistortionReport) -> tuple[Table, ...]:
    """Return a table for each kind of states and each stream."""
    return tuple(_table(report, *part) for part in _parts(report))


def seen(report: RateDistortionReport) -> str:
    """Return what the picture shows."""
    shown = [f"{STATES[kind]} as {STREAMS[stream]}" for kind, stream in _parts(report)]
    nearest = min(report.rows, key=lambda row: row.gap)
    return shortened(
        "Squared error over variance, on a logarithmic axis, against bits per element, a line for each way to "
        f"quantise, with Shannon's bound below all of them: {listing(shown)}. Nearest to the bound is {nearest.cache} "
        f"on {STATES[nearest.states]} as {STREAMS[nearest.stream]}, {nearest.gap:.2f} bits above it.",
        900,
    )


def notes(report: RateDistortionReport) -> tuple[str, ...]:
    """Return what was left out."""
    return tuple(f"{name} is left out: {why.removesuffix('.')}." for name, why in report.left_out.items())


def summary(report: RateDistortionReport) -> Group:
    """Return how far caches are from the bound."""
    columns = (
        Column(
            f"bits above it, {STATES[kind]}, {STREAMS[stream]}",
            {row.cache: number(row.gap) for row in report.rows if (row.states, row.stream) == (kind, stream)},
        )
        for kind, stream in _parts(report)
    )
    return Group("Shannon's bound", tuple(columns))


def options(file: ReportFile) -> dict[str, Any]:
    """Return the options of the command."""
    settings = settings_of(file)
    said = {name: settings[name] for name in ("states", "streams", "tokens", "heads", "device")}
    return {
        **said,
        "head-dim": settings["head_dim"],
        **cache_options(settings["caches"]),
        "seed": settings["seed"] or None,
    }


def _parts(report: RateDistortionReport) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.states, row.stream) for row in report.rows))


def _table(report: RateDistortionReport, kind: str, stream: str) -> Table:
    rows: list[RateDistortionRow] = [row for row in report.rows if (row.states, row.stream) == (kind, stream)]
    return Table.of(
        f"{STATES[kind][0].upper()}{STATES[kind][1:]}, as {STREAMS[stream]}",
        Column("bits per element", {row.cache: number(row.bits_per_element) for row in rows}),
        Column("squared error over variance", {row.cache: number(row.distortion, "{:.4g}") for row in rows}),
        Column("SNR, dB", {row.cache: number(row.snr) for row in rows}),
        Column("bits of the bound", {row.cache: number(row.bound) for row in rows}),
        Column("gap, bits", {row.cache: number(row.gap) for row in rows}),
    )

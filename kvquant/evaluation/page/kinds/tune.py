"""What a page shows of `kvquant tune`."""

from __future__ import annotations

from typing import Any

from kvquant.evaluation.notation import written
from kvquant.evaluation.page.commands import evaluation_options, settings_of
from kvquant.evaluation.page.parts import Cell, Column, Group, Table, estimate, number, plural, shortened, tokens
from kvquant.evaluation.reports import ReportFile
from kvquant.evaluation.tuning.report import TuneReport, budget_line, numbers_line, verdict

TITLE = "Bits of each layer"

_LEAD = (
    "The KL divergence to full precision was measured with the keys, or the values, of one layer in few bits and all "
    "else in {widest}; an integer program found the widths with the least sum, with {budget}. Caches were then "
    "compared on text behind that which tuned: {windows} of {length} tokens."
)


def lead(report: TuneReport) -> tuple[str, ...]:
    """Return what was measured, and what came out."""
    settings = report.settings
    said = _LEAD.format(
        widest=f"{settings['widest']:g}",
        budget=budget_line(report),
        windows=plural(settings["verify"], "window"),
        length=tokens(settings["length"]),
    )
    return said, f"{numbers_line(report)} (1/1000 nat). {verdict(report)}"


def tables(report: TuneReport) -> tuple[Table, ...]:
    """Return what was measured on held-out text."""
    rows = report.rows
    return (
        Table.of(
            "Held-out text",
            Column("bits per element", {row.cache: number(row.bits_per_element, "{:.3f}") for row in rows}),
            Column("KL predicted, 1/1000 nat", {row.cache: number(row.predicted, "{:.3g}", 1000) for row in rows}),
            Column("KL to full precision, 1/1000 nat", {row.cache: estimate(row.kl, "{:.3g}", 1000) for row in rows}),
            Column("tuned over it", {row.cache: estimate(row.ratio, "{:.3g}") for row in rows}),
            Column("first choice agrees, %", {row.cache: estimate(row.agreement, "{:.2f}", 100) for row in rows}),
        ),
    )


def seen(report: TuneReport) -> str:
    """Return what the picture shows."""
    streams = ", ".join(f"layer {row.layer} {row.stream}s {row.nbits:g}" for row in report.streams)
    return shortened(
        "Above: KL divergence to full precision, on a logarithmic axis, against bits per element, predicted for the "
        "best assignments and for one width everywhere, with what was measured on held-out text. Below: the bits of "
        f"each layer: {streams}.",
        900,
    )


def notes(report: TuneReport) -> tuple[str, ...]:
    """Return what to keep in mind."""
    return (
        "Smaller figures: 95 % confidence intervals, from windows drawn again with replacement.",
        f"The cache to take is {report.written}; what is predicted takes it that what widths add sums up.",
    )


def summary(report: TuneReport) -> Group:
    """Return what held-out text says."""
    return Group(
        f"Tuning, {plural(report.settings['verify'], 'window')}",
        (
            Column("KL, 1/1000 nat", {row.cache: estimate(row.kl, "{:.3g}", 1000) for row in report.rows}),
            Column("to take", {report.written: Cell("\N{CHECK MARK}")}),
        ),
    )


def options(file: ReportFile) -> dict[str, Any]:
    """Return the options of the command, without those of the cache, which the settings have."""
    settings = settings_of(file)
    budget = settings["budget"]
    said = {name: value for name, value in evaluation_options(file).items() if name not in ("contexts", "backends")}
    if budget["memory"] is None:
        wanted: dict[str, Any] = {"budget": budget["bits"]}
    else:
        sizes = {name: f"{budget[name]}B" for name in ("memory", "overhead") if budget[name]}
        wanted = {**sizes, "context": budget["context"], "batch": budget["batch"]}
    chosen = {name: settings[name] for name in ("widths", "length", "prefill", "windows", "verify")}
    return {**said, **wanted, "backend": _written(settings["base"]), **chosen}


def _written(base: dict[str, Any]) -> str:
    """Return the options of a cache as they are typed."""
    details = {**{name: value for name, value in base.items() if name not in ("backend", "options")}}
    details |= base.get("options", {})
    return ":".join(
        [base.get("backend", "reference"), *(f"{name}={written(value)}" for name, value in details.items())]
    )

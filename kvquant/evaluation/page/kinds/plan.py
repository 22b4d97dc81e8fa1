"""What a page shows of `kvquant plan`."""

from __future__ import annotations

from typing import Any

from kvquant.engine.memory import PARTS, format_bytes
from kvquant.evaluation.page.commands import SHIPPED, cache_options, settings_of
from kvquant.evaluation.page.parts import NOTHING, Cell, Column, Group, Table, number, plural, shortened, tokens
from kvquant.evaluation.plan import PlanReport
from kvquant.evaluation.reports import ReportFile

TITLE = "Plan"


def lead(report: PlanReport) -> tuple[str, ...]:
    """Return what was planned."""
    settings = report.settings
    model, weights = settings["model"], settings["weights"]
    prefilled, decoded = settings["context"] - settings["decode"], settings["decode"]
    size = f"{format_bytes(weights['nbytes'])}, {weights['parameters']:,} parameters, {weights['how']}"
    sequences = f"{plural(settings['batch'], 'sequence')} of {settings['context']:,} tokens"
    return (
        f"Worked out from the model's config alone: {model['architecture']}, states in {model['dtype']}.",
        f"Weights: {size}.",
        f"In the cache: {sequences}, {prefilled:,} at once and {decoded:,} one at a time.",
    )


def tables(report: PlanReport) -> tuple[Table, ...]:
    """Return what fits, and what caches are made of."""
    rows, memory = report.rows, report.settings["memory"]
    left = f"left of {format_bytes(memory)}" if memory is not None else ""
    used = [part for part in PARTS if any(row.parts.get(part) for row in rows)]
    return (
        Table.of(
            "What caches take, and what fits",
            Column("bits per element", {row.cache: number(row.bits_per_element) for row in rows}),
            Column("cache", {row.cache: _size(row.nbytes) for row in rows}),
            Column("times smaller", {row.cache: number(row.smaller) for row in rows}),
            Column("with weights", {row.cache: _size(row.total) for row in rows}),
            Column(left, {row.cache: _size(row.left) for row in rows}),
            Column("longest context that fits", _longest(report)),
        ),
        Table.of(
            "What caches are made of",
            *(Column(part, {row.cache: _size(row.parts.get(part) or None) for row in rows}) for part in used),
            Column("total", {row.cache: _size(row.nbytes) for row in rows}),
        ),
    )


def seen(report: PlanReport) -> str:
    """Return what the picture shows."""
    settings = report.settings
    sizes = ", ".join(f"{row.cache} {format_bytes(row.total)}" for row in report.rows)
    return shortened(
        f"Weights and cache together against the tokens in the cache, both on logarithmic axes, a line for each cache. "
        f"At {tokens(settings['context'])} tokens: {sizes}.",
        900,
    )


def notes(report: PlanReport) -> tuple[str, ...]:
    """Return what is not counted."""
    overhead = report.settings["overhead"]
    counted = f"{format_bytes(overhead)} are counted for" if overhead else "No room is counted for"
    said = [f"{counted} activations, and for what a prefill takes for a moment."]
    positions = report.settings["model"]["positions"]
    if positions is not None and any((row.longest or 0) > positions for row in report.rows):
        said.append(f"The model has {positions:,} positions: what is longer and fits needs them extended.")
    return tuple(said)


def summary(report: PlanReport) -> Group:
    """Return what the cache takes, and what fits."""
    rows, settings = report.rows, report.settings
    memory = settings["memory"]
    fits = f"longest context in {format_bytes(memory)}" if memory is not None else ""
    sequences = "" if settings["batch"] == 1 else f"{settings['batch']} times "
    return Group(
        f"Plan, {sequences}{tokens(settings['context'])} tokens in {settings['model']['dtype']}",
        (
            Column("cache", {row.cache: _size(row.nbytes) for row in rows}),
            Column(fits, _longest(report)),
        ),
    )


def options(file: ReportFile) -> dict[str, Any]:
    """Return the options of the command."""
    settings = settings_of(file)
    backends = cache_options(settings["caches"])
    return {
        "model": None if file.model == SHIPPED else file.model,
        "context": settings["context"],
        "decode": settings["decode"],
        "batch": settings["batch"],
        "backends": backends.pop("backends"),
        **backends,
        "memory": _bytes(settings["memory"]),
        "overhead": _bytes(settings["overhead"] or None),
        "dtype": settings["model"]["dtype"],
    }


def _longest(report: PlanReport) -> dict[str, Cell]:
    if report.settings["memory"] is None:
        return {row.cache: NOTHING for row in report.rows}
    return {row.cache: Cell("any") if row.longest is None else Cell(f"{row.longest:,}") for row in report.rows}


def _size(nbytes: int | None) -> Cell:
    return NOTHING if nbytes is None else Cell(format_bytes(nbytes))


def _bytes(count: int | None) -> str | None:
    return None if count is None else f"{count}B"

"""What a tuning found, and what it says in a line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvquant.engine.memory import format_bytes
from kvquant.evaluation.intervals import Estimate
from kvquant.evaluation.sizes import at_most


@dataclass(frozen=True)
class StreamRow:
    """The keys, or the values, of one layer.

    Attributes:
        layer: its number.
        stream: ``"key"`` or ``"value"``.
        nbits: the width that it gets.
        share: of the numbers in the cache.
        bits: bits per element in each width of the settings' `widths`: codes, scales, offsets, outliers and tables;
            without tables, which are paid for beside them, where memory is the budget.
        added: what each width adds to KL divergence, in nats.
    """

    layer: int
    stream: str
    nbits: float
    share: float
    bits: list[float]
    added: list[float]


@dataclass(frozen=True)
class CurvePoint:
    """A best assignment: its bits per element, and the KL divergence that is predicted for it, in nats."""

    bits: float
    predicted: float


@dataclass(frozen=True)
class UniformPoint:
    """The assignment with one width everywhere, likewise."""

    nbits: float
    bits: float
    predicted: float


@dataclass(frozen=True)
class TuneRow:
    """A cache that was measured on held-out text.

    Attributes:
        cache: what it is: the tuned one is the first of a report, the largest uniform one within the budget the second.
        bits_per_element: of what is quantised, as measured there.
        predicted: the KL divergence that sensitivities sum up to, in nats.
        kl: the KL divergence to full precision, in nats.
        ratio: the KL divergence of the tuned cache over it, window by window; None for that one itself.
        agreement: share of positions whose likeliest token is that of full precision.
        windows: KL divergence of each window.
    """

    cache: str
    bits_per_element: float
    predicted: float
    kl: Estimate
    ratio: Estimate | None
    agreement: Estimate
    windows: list[float]


@dataclass(frozen=True)
class TuneReport:
    """What was found, on what; `to_dict()` gives plain builtins.

    Attributes:
        settings: what results depend on.
        floor: KL divergence with the most bits everywhere, in nats, on the text that tunes.
        streams: keys and values layer by layer, with what they get.
        curve: the trade-off: best assignments from the fewest bits to the most.
        uniform: one width everywhere, beside it.
        written: the cache of `rows` with the least KL divergence on held-out text.
        config: its options.
        rows: what was measured on held-out text.
    """

    settings: dict[str, Any]
    floor: float
    streams: list[StreamRow]
    curve: list[CurvePoint]
    uniform: list[UniformPoint]
    written: str
    config: dict[str, Any]
    rows: tuple[TuneRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins, fit for JSON."""
        found = asdict(self)
        return {"kind": "tune", "settings": found.pop("settings"), "results": found.pop("rows"), **found}

    @property
    def is_uniform(self) -> bool:
        """Whether the tuned assignment is one of the uniform ones."""
        caches = self.settings["caches"]
        tuned, *rivals = (caches[row.cache] for row in self.rows)
        return tuned in rivals


def budget_line(report: TuneReport) -> str:
    """Return how many bits there are, and why."""
    budget = report.settings["budget"]
    if budget["memory"] is None:
        return f"at most {at_most(budget['bits'])} bits per element"
    sequences = "" if budget["batch"] == 1 else f"{budget['batch']} times "
    overhead = f" and {format_bytes(budget['overhead'])} of overhead" if budget["overhead"] else ""
    memory, weights, left = format_bytes(budget["memory"]), format_bytes(budget["weights"]), at_most(budget["left"])
    return (
        f"{memory} less weights of {weights}{overhead} leave {left} bits per element at "
        f"{sequences}{budget['context']:,} tokens, window and sink included"
    )


def numbers_line(report: TuneReport) -> str:
    """Return what was measured of the tuned cache and of each uniform one, in thousandths of a nat."""
    tuned, *rivals = report.rows
    said = [f"tuned: {_measured(tuned)}"]
    for row in rivals:
        ratio = "" if row.ratio is None else f", ratio {ratio_text(row.ratio)}"
        said.append(f"{row.cache}: {_measured(row)}{ratio}")
    return "; ".join(said)


def verdict(report: TuneReport) -> str:
    """Return what follows from it, in a sentence."""
    tuned = report.rows[0]
    if report.written != tuned.cache:
        better = next(row for row in report.rows if row.cache == report.written)
        return (
            f"The tuned cache is not better on held-out text: {better.cache} has {_measured(better)}, "
            "and is the one to take."
        )
    if len(report.rows) == 1:
        return "No cache with one width everywhere is within the budget, so there is none to compare with."
    if report.is_uniform:
        return "The best assignment within the budget is a uniform one."
    unsure = [
        row.cache for row in report.rows[1:] if row.ratio is None or row.ratio.high is None or row.ratio.high >= 1
    ]
    if unsure:
        return f"The tuned cache is better on held-out text, but than {' and '.join(unsure)} maybe by chance."
    return "The tuned cache is better on held-out text."


def _measured(row: TuneRow) -> str:
    return f"KL {1000 * row.kl.value:.3g} at {row.bits_per_element:.3g} bits"


def ratio_text(ratio: Estimate) -> str:
    """Return a ratio and its interval, whose ends are written so that they are on their side of 1."""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3g}"
    return f"{ratio.value:.3g} ({beside_one(ratio.low)}, {beside_one(ratio.high)})"


def beside_one(ratio: float) -> str:
    """Return a ratio with three digits, or as many as it takes to see on which side of 1 it is."""
    return next(text for digits in range(3, 18) if (text := f"{ratio:.{digits}g}") != "1" or ratio == 1)

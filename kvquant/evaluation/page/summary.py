"""The table on top of a page: what each cache loses and what it gains, from all measurements of one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType

from kvquant.evaluation.candidates import FULL
from kvquant.evaluation.figures import perplexity as figure
from kvquant.evaluation.page.commands import plain_model
from kvquant.evaluation.page.kinds import perplexity
from kvquant.evaluation.page.naming import Measurement
from kvquant.evaluation.page.parts import Column, Group, Picture, Section, Table, at_longest, number, tokens, used
from kvquant.evaluation.page.pictures import picture
from kvquant.evaluation.perplexity import PerplexityReport

#: Kinds that say what a model's caches lose. What the others say of one model holds for all where they have no better.
QUALITY = ("perplexity", "needle", "longbench", "attention", "tune")
#: Kinds whose caches stand in the table only beside others that were measured with a model, unless there are none.
_ASIDE = ("plan", "rate_distortion")

_LEAD = (
    "A row is a cache. Bits per element are what it stores for each number that it quantises: codes, scales, offsets, "
    "tables. KL divergence says how far what the model expects moves away from full precision, and tells caches apart "
    "where perplexity hardly moves. Figures are of the longest context measured; smaller ones are 95 % confidence "
    "intervals, and of times the lowest and the highest."
)
_MARKED = (
    "A row with a dot is the best for its bits: no other cache measured has fewer bits per element and no larger KL "
    "divergence, or as few and a smaller one. Look at the intervals before you believe in a small difference."
)


def summaries(measured: Sequence[Measurement], kind: Callable[[str], ModuleType]) -> list[Section]:
    """Return a section for each model whose quality was measured, one for everything where none was.

    Args:
        measured: all that is on the page.
        kind: from the name of a kind to its module.
    """
    models = list(dict.fromkeys(one.model for one in measured if one.kind in QUALITY))
    if not models:
        return [_summary("", measured, kind, 0)]
    return [_summary(model, _about(model, measured), kind, number) for number, model in enumerate(models)]


def _about(model: str, measured: Sequence[Measurement]) -> list[Measurement]:
    """Return what was measured of a model, and what was measured of none whose quality is known."""
    about = [one for one in measured if one.kind in QUALITY and one.model == model]
    for kind in dict.fromkeys(one.kind for one in measured if one.kind not in QUALITY):
        same = [one for one in measured if one.kind == kind]
        about += [one for one in same if one.model == plain_model(model)] or same
    return about


def _summary(model: str, measured: Sequence[Measurement], kind: Callable[[str], ModuleType], place: int) -> Section:
    bits = bits_per_element(measured)
    named = [(one, kind(one.kind).summary(one.report)) for one in measured]
    groups = [_headed(one, group, model) for one, group in named]
    ordered = sorted(_caches(named), key=lambda cache: (cache != FULL, -bits.get(cache, -1.0)))
    scored = next((one.report for one in measured if isinstance(one.report, PerplexityReport)), None)
    marked = frozenset[str]() if scored is None else best(scored)
    stored = Column("bits per element", {cache: number(value) for cache, value in bits.items()})
    table = Table("", tuple(ordered), used([Group("", (stored,)), *groups]), marked)
    return Section(
        anchor=f"summary-{place + 1}",
        title="Summary",
        subtitle=model,
        lead=(_LEAD,) if place == 0 else (),
        tables=(table,),
        notes=(_MARKED,) if marked else (),
        pictures=() if scored is None else _quality(scored),
    )


def _caches(named: Sequence[tuple[Measurement, Group]]) -> list[str]:
    """Return the caches that were measured with a model or timed; those of the others where none were."""
    measured = [group for one, group in named if one.kind not in _ASIDE] or [group for _, group in named]
    return list(dict.fromkeys(cache for group in measured for column in group.columns for cache in column.cells))


def _headed(one: Measurement, group: Group, model: str) -> Group:
    """Say in the heading of columns of which model they are, where that is not the table's, or of which files."""
    of = one.apart if one.model in (model, plain_model(model)) else one.subject
    return dataclasses.replace(group, heading=f"{group.heading} ({of})") if of else group


def bits_per_element(measured: Iterable[Measurement]) -> dict[str, float]:
    """Return what caches store for each number that they quantise, as the first measurement that knows it says."""
    found: dict[str, float] = {}
    for one in measured:
        for row in sorted(getattr(one.report, "rows", ()), key=lambda row: -getattr(row, "context", 0)):
            if row.bits_per_element is not None and not hasattr(row, "stream"):  # which is half of a cache
                found.setdefault(row.cache, row.bits_per_element)
    return found


def best(report: PerplexityReport) -> frozenset[str]:
    """Return the caches for which no other has fewer bits and no larger KL divergence, or as few and a smaller one."""
    points: Mapping[str, tuple[float, float]] = {
        row.cache: (row.bits_per_element, row.kl.value)
        for row in at_longest(report.rows)
        if row.cache != FULL and row.bits_per_element is not None
    }
    return frozenset(
        cache
        for cache, (bits, kl) in points.items()
        if not any(b <= bits and k <= kl and (b, k) != (bits, kl) for b, k in points.values())
    )


def _quality(report: PerplexityReport) -> tuple[Picture, ...]:
    longest = dataclasses.replace(report, rows=at_longest(report.rows))
    seen = perplexity.seen(longest)
    if not seen:
        return ()
    at = tokens(longest.rows[0].context)
    caption = f"Quality against bits per element at {at} tokens: lower is better, further left is smaller."
    return (picture(lambda: figure.draw(longest), seen, caption),)

"""What came of running models, in the words of a table."""

from __future__ import annotations

from collections.abc import Mapping

from kvquant.evaluation.support.check import ABSENT, FAILED, OK, QUANTISED, QUANTISED_WINDOW, REFUSED, Checked

#: Columns of the table, in the terminal and in Markdown.
HEADINGS = ("family", "layers", "before quantising", "tokens quantised", "logits off by", "decoding", "note")


def cells(checked: Checked, nbits: float) -> list[str]:
    """Return one row of the table.

    Args:
        checked: what came of running a model.
        nbits: bits that it was run with.
    """
    if checked.status in (ABSENT, FAILED):
        return [checked.name, "", "", "", "", "", f"{checked.status}: {checked.reason}"]
    if checked.status == REFUSED:
        return [checked.name, "refused", "", "", "", "", checked.note or checked.reason]
    layers, quantised = _layers(checked.layers), f"{checked.quantised} of {checked.tokens}"
    if checked.cross:
        layers += f"; for the encoder's states {_layers(checked.cross)}"
        quantised += f", {checked.cross_quantised} of {checked.cross_tokens}"
    wrong = checked.problems(nbits)
    return [
        checked.name,
        layers,
        "as DynamicCache" if checked.equal else "other tokens",
        quantised if any((checked.quantised, checked.cross_quantised)) else "none",
        f"{checked.deviation:.1%}" if checked.steps and checked.deviation is not None else "",
        checked.steps,
        "; ".join([*(f"WRONG: {problem}" for problem in wrong), *([checked.note] if checked.note else [])]),
    ]


def markdown(rows: list[list[str]]) -> str:
    """Return rows as a table in Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def summary(results: list[Checked], nbits: float) -> str:
    """Return on one line how many work, and how."""
    counts = {status: sum(one.status == status for one in results) for status in (OK, REFUSED, ABSENT, FAILED)}
    wrong = sum(bool(one.problems(nbits)) for one in results)
    fused = sum(one.steps == "fused" for one in results)
    told = [f"{len(results)} families: {counts[OK] + counts[FAILED] - wrong} work, {fused} of them fused"]
    told += [f"{counts[status]} {status}" for status in (REFUSED, ABSENT) if counts[status]]
    return ", ".join([*told, f"{wrong} wrong"])


def _layers(kinds: Mapping[str, int]) -> str:
    """Return such as ``2 of 4 quantised (1 sliding window), 1 linear``."""
    windows = kinds.get(QUANTISED_WINDOW, 0)
    quantised, every = kinds.get(QUANTISED, 0) + windows, sum(kinds.values())
    own = [f"{count} {kind}" for kind, count in kinds.items() if kind not in (QUANTISED, QUANTISED_WINDOW)]
    sliding = f" ({windows} sliding window)" if windows else ""
    return ", ".join([f"{quantised} of {every} quantised{sliding}", *own])

"""What a model and its cache will take, and what fits: worked out from the model's config alone.

Weights are counted from the model made without numbers. What each layer caches is seen in a forward pass without
numbers; how a backend writes it down is seen by having it quantise a little random data; how windows and pages grow
is decided by the functions by which the cache itself decides. The rest is arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kvquant.engine.config import CacheConfig, device_name
from kvquant.engine.memory import LayerMemory
from kvquant.engine.options import is_int, layers_text
from kvquant.engine.packing import WIDTHS
from kvquant.engine.settings import check_device
from kvquant.errors import OptionValueError, UnsupportedError
from kvquant.evaluation.candidates import FULL, Candidate, is_preset, parse_candidates
from kvquant.evaluation.notation import Written, read_cache, split_caches
from kvquant.evaluation.planning.model import ModelShape
from kvquant.evaluation.planning.sizes import cache_sizes

#: Tokens in the cache where neither the user nor the config says how many.
_CONTEXT = 32 << 10
#: Tokens that come one at a time where nobody says how many: with the first of them pages with spare room are made.
DECODED = 256
#: Points of a line of the picture.
_POINTS = 25


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What to plan.

    Attributes:
        candidates: the caches, full precision first.
        context: tokens in the cache; None takes the model's positions, or 32k where its config does not say.
        decode: how many of them come one at a time, after a prefill of the others; None takes 256, or all but the first
            of a shorter context. With the first of them that are quantised a page with room for more is made.
        batch: sequences at once.
        memory: bytes that there are, None to leave out what fits.
        overhead: bytes beside weights and cache.
        device: where a backend quantises a little data.

    Raises:
        OptionValueError: a value can never work.
    """

    candidates: tuple[Candidate, ...]
    context: int | None = None
    decode: int | None = None
    batch: int = 1
    memory: int | None = None
    overhead: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for option, least in (("context", 1), ("decode", 0), ("batch", 1), ("overhead", 0)):
            value = getattr(self, option)
            if value is not None and (not is_int(value) or value < least):
                raise OptionValueError(option, value, f"a whole number, at least {least}")
        check_device(CacheConfig(device=device_name(self.device)))
        other = [candidate.label for candidate in self.candidates if candidate.kind not in (FULL, "kvquant")]
        if other:
            raise OptionValueError("backend", other[0], "a backend or a preset of kvquant")
        for candidate in self.candidates:
            room = candidate.options.get("max_cache_len") if candidate.kind == "kvquant" else None
            if room is not None:
                expected = f"None: what a cache of fixed size takes is planned with a context of {room} tokens"
                raise OptionValueError("max_cache_len", room, expected)

    def arrival(self, model: ModelShape) -> tuple[int, int]:
        """Return the tokens in the cache, and how many of them come one at a time.

        Raises:
            OptionValueError: they are not fewer.
        """
        context = self.context or model.positions or _CONTEXT
        decode = min(DECODED, context - 1) if self.decode is None else self.decode
        if decode >= context:
            raise OptionValueError("decode", decode, f"fewer tokens than the context of {context}")
        return context, decode

    def settings(self, model: ModelShape) -> dict[str, Any]:
        """Return what results depend on, in plain builtins."""
        context, decode = self.arrival(model)
        return {
            "model": model.describe(),
            "weights": asdict(model.weights),
            "context": context,
            "decode": decode,
            "batch": self.batch,
            "memory": self.memory,
            "overhead": self.overhead,
            "caches": {candidate.label: candidate.settings() for candidate in self.candidates},
        }


@dataclass(frozen=True)
class PlanRow:
    """One cache.

    Attributes:
        cache: its label.
        nbytes: bytes of the cache with the context in it.
        parts: these bytes by part, those of `kvquant.engine.memory.PARTS`.
        smaller: how many times smaller it is than full precision.
        bits_per_element: of what is quantised (codes, scales, offsets, tables); those of the type for full precision;
            None where nothing is quantised.
        most_nbytes: bytes of the cache if all of its scales were float32, which some keys need.
        total: bytes of weights, cache and overhead.
        left: bytes of the memory that are left then, below 0 where it does not fit; None without a memory.
        longest: the most tokens up to which everything fits, 0 where not even one does; None without a memory, and
            where the context does not matter.
        layers: layers that are alike, with the bytes and the parts of each: ``{"layers": "0-3", "nbytes": ...}``.
        curve: ``(tokens, bytes of the cache)``, for a picture.
    """

    cache: str
    nbytes: int
    parts: dict[str, int]
    smaller: float
    bits_per_element: float | None
    most_nbytes: int
    total: int
    left: int | None
    longest: int | None
    layers: list[dict[str, Any]]
    curve: list[tuple[int, int]]


@dataclass(frozen=True)
class PlanReport:
    """A plan; `to_dict()` gives plain builtins."""

    settings: dict[str, Any]
    rows: tuple[PlanRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins, fit for JSON."""
        return {"kind": "plan", "settings": self.settings, "results": [asdict(row) for row in self.rows]}


def planned_candidates(
    text: str, nbits: Iterable[float] | None = None, shared: Mapping[str, Any] | None = None
) -> tuple[Candidate, ...]:
    """Read caches as `parse_candidates` does, in every whole width that they have where they name none.

    Args:
        text: caches separated by commas.
        nbits: widths of those that name none, None for all whole ones that the backend has with these options.
        shared: options of `CacheConfig` for all caches that do not say otherwise themselves.

    Raises:
        ConfigError, BackendError: see `parse_candidates`.
    """
    found: list[str] = []
    for part in split_caches(text):
        if _says_bits(read_cache(part)):
            found.append(part)
        else:
            found += _all_widths(part, shared) if nbits is None else [f"{part}:{width}" for width in nbits]
    return parse_candidates(",".join(found), shared)


def _says_bits(cache: Written) -> bool:
    """Whether a cache is written with its bits, or is one that has its own."""
    as_options = cache.says("nbits") or (cache.says("nbits_key") and cache.says("nbits_value"))
    return cache.name == FULL or bool(cache.widths) or as_options or is_preset(cache)


def _all_widths(part: str, shared: Mapping[str, Any] | None) -> list[str]:
    works, reasons = [], []
    for width in sorted((width for width in WIDTHS if width == int(width)), reverse=True):
        try:
            parse_candidates(f"{part}:{width}", shared)
        except UnsupportedError as cause:
            reasons.append(cause)
        else:
            works.append(f"{part}:{width}")
    if not works:
        raise reasons[0]
    return works


def make_plan(model: ModelShape, options: PlanOptions) -> PlanReport:
    """Work out what weights and caches take, and what fits.

    Args:
        model: made for the batch of the options.
        options: what to plan.

    Raises:
        ConfigError, BackendError: a cache cannot be made for this model.
    """
    device, (context, decode) = torch.device(options.device), options.arrival(model)
    sizes = {candidate: cache_sizes(candidate, model, decode, device) for candidate in options.candidates}
    fixed = model.weights.nbytes + options.overhead
    budget = None if options.memory is None else options.memory - fixed
    longest = {one: None if budget is None else size.longest(budget) for one, size in sizes.items()}
    points = _points(context, max(length or 0 for length in longest.values()))
    full = sizes[options.candidates[0]].report(context).nbytes
    rows = []
    for candidate, size in sizes.items():
        report = size.report(context)
        bits = 8 * getattr(torch, model.dtype).itemsize if candidate.kind == FULL else report.bits_per_element
        rows.append(
            PlanRow(
                cache=candidate.label,
                nbytes=report.nbytes,
                parts=report.parts,
                smaller=full / max(1, report.nbytes),
                bits_per_element=bits,
                most_nbytes=size.widest().nbytes(context),
                total=fixed + report.nbytes,
                left=None if options.memory is None else options.memory - fixed - report.nbytes,
                longest=longest[candidate],
                layers=_layers(report.layers),
                curve=[(tokens, size.nbytes(tokens)) for tokens in points],
            )
        )
    return PlanReport(options.settings(model), tuple(rows))


def _points(context: int, longest: int) -> list[int]:
    """Return numbers of tokens for a line, evenly spaced on a logarithmic axis."""
    low, high = max(1, min(1024, context // 8)), max(2 * context, longest)
    return sorted({round(low * (high / low) ** (step / (_POINTS - 1))) for step in range(_POINTS)})


def _layers(memories: Iterable[LayerMemory]) -> list[dict[str, Any]]:
    alike: dict[str, list[LayerMemory]] = {}
    for memory in memories:
        alike.setdefault(repr(replace(memory, layer=0)), []).append(memory)
    return [
        {
            "layers": layers_text(tuple(memory.layer for memory in group)),
            "quantized_tokens": group[0].quantized_tokens,
            "nbytes": group[0].nbytes,
            "parts": group[0].parts,
        }
        for group in alike.values()
    ]

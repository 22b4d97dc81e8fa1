"""The caches that an evaluation compares: how they are written, made afresh for each sequence, and measured."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers import QuantizedCache as TransformersQuantizedCache
from transformers.cache_utils import CacheLayerMixin

from kvquant.cache.cache import QuantizedCache
from kvquant.cache.compat import OWN_QUANTIZED_LAYER
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import OPTIONS, PRESETS, CacheConfig, overridden
from kvquant.engine.memory import layer_memory
from kvquant.engine.options import ALIASES, rename_options
from kvquant.engine.settings import layer_settings
from kvquant.engine.typed import looks_like_width, parse_value, parse_width
from kvquant.errors import (
    DuplicateBackendError,
    KVQuantError,
    OptionValueError,
    UnknownBackendError,
    UnknownOptionError,
    UnsupportedError,
)
from kvquant.evaluation.contenders import Contender, cache_bytes, one_line
from kvquant.evaluation.measure import held_bytes
from kvquant.plugin.capabilities import AXES
from kvquant.registry import find_backend, list_backends

FULL = "full"
_TRANSFORMERS = "transformers"
#: Options of transformers' own quantised cache, as kvquant calls them, and as it does. Its axes are integers with
#: meanings of their own.
_TRANSFORMERS_OPTIONS = {
    "axis_key": "axis_key",
    "axis_value": "axis_value",
    "group_size": "q_group_size",
    "residual_length": "residual_length",
}

_SYNTAX = (
    "BACKEND[:NBITS][:AXIS][:OPTION=VALUE], such as reference:4, hqq:2:group_size=32, "
    "reference:2:axis_key=token:sink_length=4, kivi-2 or transformers:quanto:4"
)


@dataclass(frozen=True)
class Candidate:
    """A cache to be evaluated.

    Attributes:
        label: its name, as a user writes it and as results are filed under.
        kind: ``"full"`` (transformers' `DynamicCache`), ``"kvquant"`` or ``"transformers"`` (its `QuantizedCache`).
        options: of a `CacheConfig`, or the arguments of transformers' cache. Not part of a comparison of two
            candidates, because values may be lists; no two have the same label.
    """

    label: str
    kind: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def make(self, config: PreTrainedConfig) -> Cache:
        """Return an empty cache for a model with this config.

        Raises:
            UnsupportedError: it cannot be used with this model, or not here.
            ConfigError: an option cannot be honoured.
        """
        if self.kind == FULL:
            return DynamicCache(config=config)
        if self.kind == "kvquant":
            return QuantizedCache.from_config(self.options, config)
        try:
            return TransformersQuantizedCache(config=config, **self.options)
        except (ImportError, ValueError) as cause:
            raise UnsupportedError(f"the cache {self.label!r}", [one_line(cause).rstrip(".")]) from cause

    def settings(self) -> dict[str, Any]:
        """Return all options in plain builtins, those at their defaults too: results depend on them."""
        options = CacheConfig.from_dict(self.options).to_dict() if self.kind == "kvquant" else dict(self.options)
        return {"kind": self.kind, **options}


# ------------------------------------------------------------------------------------------------ how they are written


def parse_candidates(text: str, shared: Mapping[str, Any] | None = None) -> tuple[Candidate, ...]:
    """Read candidates separated by commas; `FULL` is always the first of them.

    Each is a backend of kvquant (``BACKEND[:NBITS...][:AXIS][:OPTION=VALUE...]``), a preset of kvquant with options of
    its own (``kivi-2[:OPTION=VALUE...]``), or transformers' quantised cache (``transformers:BACKEND[:NBITS...][...]``).
    Several widths make several candidates: ``reference:8:4:2``. An AXIS is for keys and values both. An OPTION that
    `CacheConfig` has is the cache's; any other is the backend's own. Commas within brackets separate nothing:
    ``reference:2:skip_layers=[0,1]``.

    Args:
        text: the candidates.
        shared: options of `CacheConfig` for all of kvquant's that do not say otherwise themselves.

    Raises:
        UnknownBackendError, BackendUnavailableError: a backend does not exist, or cannot be used here.
        OptionValueError: something is written in another way, a value can never work, or a candidate comes twice.
        UnsupportedError: a backend cannot do what is asked.
    """
    shared = {name: value for name, value in (shared or {}).items() if value is not None}
    CacheConfig.from_dict(shared)  # values that can never work are an error even if no candidate takes them
    found = [Candidate(FULL, FULL)]
    for part in split_candidates(text):
        if part == FULL:
            continue
        name, *details = (detail.strip() for detail in _outside_brackets(part, ":"))
        if not name:
            raise OptionValueError("backends", text, _SYNTAX)
        if name == _TRANSFORMERS:
            found += _transformers(part, details)
        else:
            found += _kvquant(part, name, details, shared)
    labels = [candidate.label for candidate in found]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise OptionValueError("backends", text, f"each cache once; {twice} is named twice")
    return tuple(found)


def usable_candidates(text: str, shared: Mapping[str, Any] | None = None) -> tuple[tuple[Candidate, ...], list[str]]:
    """Read candidates that nobody asked for by name: what cannot be used here is left out.

    Returns:
        The candidates, and a sentence for each that is left out.
    """
    usable: list[str] = []
    left_out: list[str] = []
    for part in split_candidates(text):
        try:
            for candidate in parse_candidates(part, shared):
                if candidate.kind == _TRANSFORMERS:
                    candidate.make(_SOME_MODEL)
        except KVQuantError as cause:
            left_out.append(f"{part} is left out: {one_line(cause)}")
        else:
            usable.append(part)
    return parse_candidates(",".join(usable) or FULL, shared), left_out


#: A model that every cache can be made for, to find out whether its library is there.
_SOME_MODEL = PreTrainedConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=1)


def split_candidates(text: str) -> list[str]:
    """Return the candidates in a text as they are written there; commas within brackets separate nothing."""
    return [part.strip() for part in _outside_brackets(text, ",")]


def _outside_brackets(text: str, separator: str) -> list[str]:
    return re.split(rf"{separator}(?![^\[]*\])", text)


def _kvquant(part: str, name: str, details: list[str], shared: Mapping[str, Any]) -> list[Candidate]:
    preset: Mapping[str, Any] = {}
    if details and not _is_detail(details[0]):
        name, details = f"{name}:{details[0]}", details[1:]  # a distribution and its backend
    if name in PRESETS and not _exists(name):
        preset, start = PRESETS[name], {}
    else:
        _require(name)
        start = {"backend": name}
    widths, axes, options = _read(part, details)
    if preset and widths:
        raise OptionValueError("backends", part, f"no bits after the preset {name!r}, which says them itself")
    if len(axes) > 1:
        raise OptionValueError("backends", part, "one axis for both, or axis_key=... and axis_value=...")
    candidates = []
    each: list[float | None] = [*widths]
    for nbits in each or [None]:
        chosen: dict[str, Any] = {**shared, **preset, **start}
        if nbits is not None:
            chosen["nbits"] = nbits
        if axes:
            chosen.update(axis_key=axes[0], axis_value=axes[0])
        own = {option: value for option, value in options.items() if ALIASES.get(option, option) not in OPTIONS}
        written = {key: value for key, value in options.items() if key not in own}
        chosen = overridden(chosen, rename_options(written, OPTIONS))
        if own:
            chosen["options"] = {**chosen.get("options", {}), **own}
        config = CacheConfig.from_dict(chosen)
        layer_settings(config)  # refuse now what can be told to be impossible for every model
        width = [] if preset else [str(config.nbits)]
        label = ":".join([name, *width, *axes, *(f"{key}={_written(value)}" for key, value in options.items())])
        candidates.append(Candidate(label, "kvquant", chosen))
    return candidates


def _transformers(part: str, details: list[str]) -> list[Candidate]:
    named = details[:1] if details and not _is_detail(details[0]) else []
    widths, axes, options = _read(part, details[len(named) :])
    if axes:
        raise OptionValueError("backends", part, "axis_key and axis_value as integers, as transformers means them")
    options = rename_options(options, _TRANSFORMERS_OPTIONS)
    written = [f"{name}={_written(value)}" for name, value in options.items()]
    candidates = []
    for width in [[str(nbits)] for nbits in widths] or [[]]:
        try:
            cache = Contender.parse(":".join([_TRANSFORMERS, *named, *width]))
        except OptionValueError as cause:
            raise OptionValueError("backends", part, cause.expected) from cause
        arguments = {_TRANSFORMERS_OPTIONS[name]: value for name, value in options.items()}
        if cache.backend != "fp8":
            arguments["nbits"] = cache.nbits
        elif options:
            raise OptionValueError("backends", part, "'transformers:fp8' without options: it has none")
        label = ":".join([cache.label, *written])
        candidates.append(Candidate(label, _TRANSFORMERS, {"backend": cache.backend, **arguments}))
    return candidates


def _read(part: str, details: Iterable[str]) -> tuple[list[float], list[str], dict[str, Any]]:
    """Return the widths, axes and options among `details`."""
    widths: list[float] = []
    axes: list[str] = []
    options: dict[str, Any] = {}
    for detail in details:
        if not _is_detail(detail):
            raise OptionValueError("backends", part, _SYNTAX)
        option, equals, value = detail.partition("=")
        if equals:
            options[option.strip()] = parse_value(value)
        elif detail in AXES:
            axes.append(detail)
        else:
            widths.append(parse_width(detail))
    return widths, axes, options


def _is_detail(text: str) -> bool:
    return looks_like_width(text) or text in AXES or text.find("=") > 0


def _written(value: Any) -> str:
    return str(value).replace(" ", "")


def _exists(name: str) -> bool:
    try:
        find_backend(name)
    except UnknownBackendError:
        return False
    except DuplicateBackendError:
        return True
    return True


def _require(name: str) -> None:
    try:
        find_backend(name).require()
    except UnknownBackendError as cause:
        known = [*sorted(backend.name for backend in list_backends()), _TRANSFORMERS, *PRESETS]
        raise UnknownOptionError("backend", name, known) from cause


# ------------------------------------------------------------------------------------------------ what they hold


def elements(full: Cache) -> int:
    """Return how many numbers a full-precision cache holds: keys and values of all tokens, rows and heads."""
    return sum(
        states.numel()
        for layer in full.layers
        for states in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if states is not None
    )


def cache_bits(cache: Cache, numbers: int) -> float:
    """Return the bits of everything that a cache holds (window, sink and spare room too) over `numbers` elements."""
    return 8 * cache_bytes(cache) / max(1, numbers)


def body_bits(cache: Cache) -> float | None:
    """Return the bits per element of what a cache has quantised: codes, scales, offsets and tables, measured.

    Returns:
        None while nothing is quantised, and for a cache that never quantises.
    """
    if isinstance(cache, QuantizedCache):
        return cache.bits_per_element
    held = quantized = 0
    for layer in cache.layers:
        if isinstance(layer, OWN_QUANTIZED_LAYER) and layer._quantized_keys is not None:
            pair = (layer._quantized_keys, layer._quantized_values)
            held += held_bytes(*pair)
            quantized += sum(layer._dequantize(states).numel() for states in pair)
    return 8 * held / quantized if quantized else None


def held_states(layer: CacheLayerMixin) -> tuple[Any, Any]:
    """Return keys and values of all tokens as a layer holds them now, dequantised where they are quantised.

    Returns:
        Two tensors ``[batch, kv_heads, tokens, head_dim]``.
    """
    if isinstance(layer, OWN_QUANTIZED_LAYER):
        import torch

        pairs = ((layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values))
        whole = (
            layer._dequantize(quantized) if not recent.numel() else torch.cat([layer._dequantize(quantized), recent], 2)
            for quantized, recent in pairs
        )
        keys, values = whole
        return keys, values
    return layer.keys, layer.values


def is_quantized(layer: Any) -> bool:
    """Whether a layer of a cache quantises."""
    return isinstance(layer, (QuantizedLayer, OWN_QUANTIZED_LAYER))


@dataclass(frozen=True)
class QuantizedStream:
    """What a layer has quantised of its keys, or of its values.

    Attributes:
        start, stop: the first of these tokens, and the first behind them.
        bits_per_element: bits of codes, scales, offsets and tables over the numbers that they stand for.
        axis: what shares a scale; None where transformers' integers say it.
    """

    start: int
    stop: int
    bits_per_element: float
    axis: str | None


def quantized_streams(layer: Any) -> tuple[QuantizedStream, ...]:
    """Return what a layer has quantised of its keys and of its values; empty while there is nothing."""
    if isinstance(layer, QuantizedLayer):
        streams = []
        for store in layer.stores if layer.is_initialized else ():
            numbers = len(store.body) * store.batch * store.kv_heads * store.head_dim
            bits = layer_memory(0, len(store), (len(store.body), numbers), store.parts()).bits_per_element
            if bits is not None:
                start = store.sink_tokens
                streams.append(QuantizedStream(start, start + len(store.body), bits, store.body.encoder.scheme.axis))
        return tuple(streams)
    if not isinstance(layer, OWN_QUANTIZED_LAYER) or layer._quantized_keys is None:
        return ()
    pair = [(states, layer._dequantize(states)) for states in (layer._quantized_keys, layer._quantized_values)]
    return tuple(
        QuantizedStream(0, read.shape[2], 8 * held_bytes(states) / read.numel(), None) for states, read in pair
    )

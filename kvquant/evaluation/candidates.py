"""The caches that an evaluation compares: how they are written, made afresh for each sequence, and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
from kvquant.engine.store import Store
from kvquant.errors import (
    DuplicateBackendError,
    KVQuantError,
    OptionValueError,
    UnknownBackendError,
    UnknownOptionError,
    UnsupportedError,
    listing,
)
from kvquant.evaluation.failures import one_line
from kvquant.evaluation.in_use import cache_bytes
from kvquant.evaluation.measure import held_bytes
from kvquant.evaluation.notation import Written, read_cache, split_caches, written
from kvquant.registry import find_backend, list_backends

FULL = "full"
_TRANSFORMERS = "transformers"
#: Backends of transformers' own quantised cache and the widths that each has; the first is the usual one.
TRANSFORMERS_NBITS = {"quanto": (4, 2), "hqq": (4, 1, 2, 3, 8), "fp8": (8,)}
#: Options of transformers' own quantised cache, as kvquant calls them, and as it does. Its axes are integers with
#: meanings of their own.
_TRANSFORMERS_OPTIONS = {
    "axis_key": "axis_key",
    "axis_value": "axis_value",
    "group_size": "q_group_size",
    "residual_length": "residual_length",
}


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


def parse_candidates(
    text: str, shared: Mapping[str, Any] | None = None, *, option: str = "backends", check: bool = True
) -> tuple[Candidate, ...]:
    """Read candidates separated by commas; `FULL` is always the first of them.

    Each is a backend of kvquant (``BACKEND[:NBITS...][:AXIS][:OPTION=VALUE...]``), a preset of kvquant with options of
    its own (``kivi-2[:OPTION=VALUE...]``), or transformers' quantised cache (``transformers:BACKEND[:NBITS...][...]``).
    Several widths make several candidates: ``reference:8:4:2``. An AXIS is for keys and values both. An OPTION that
    `CacheConfig` has is the cache's; any other is the backend's own. Values may be JSON, see `notation`.

    Args:
        text: the candidates.
        shared: options of `CacheConfig` for all of kvquant's that do not say otherwise themselves.
        option: what messages call the option that `text` is of.
        check: whether a backend that cannot be used here, or cannot do what is asked, is refused now.

    Raises:
        UnknownBackendError, BackendUnavailableError: a backend does not exist, or cannot be used here.
        OptionValueError: something is written in another way, a value can never work, or a candidate comes twice.
        UnsupportedError: a backend cannot do what is asked.
    """
    shared = {name: value for name, value in (shared or {}).items() if value is not None}
    CacheConfig.from_dict(shared)  # values that can never work are an error even if no candidate takes them
    found = [Candidate(FULL, FULL)]
    for part in split_caches(text):
        if part == FULL:
            continue
        cache = read_cache(part, option)
        if cache.names[0] == _TRANSFORMERS:
            found += _transformers(cache, option)
        else:
            found += _kvquant(cache, shared, option, check=check)
    labels = [candidate.label for candidate in found]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise OptionValueError(option, text, f"each cache once; {twice} is named twice")
    return tuple(found)


def usable_candidates(text: str, shared: Mapping[str, Any] | None = None) -> tuple[tuple[Candidate, ...], list[str]]:
    """Read candidates that nobody asked for by name: what cannot be used here is left out.

    Returns:
        The candidates, and a sentence for each that is left out.
    """
    usable: list[str] = []
    left_out: list[str] = []
    for part in split_caches(text):
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


def is_preset(cache: Written) -> bool:
    """Whether a cache is written as a preset: by the name of one, which no backend has."""
    return cache.name in PRESETS and not backend_exists(cache.name)


def _kvquant(cache: Written, shared: Mapping[str, Any], option: str, *, check: bool) -> list[Candidate]:
    preset: Mapping[str, Any] = PRESETS[cache.name] if is_preset(cache) else {}
    start: dict[str, Any] = {}
    if not preset:
        start = {"backend": cache.name}
        _require(cache.name, usable=check)
    if preset and cache.widths:
        expected = f"no bits after the preset {cache.name!r}, which says them itself"
        raise OptionValueError(option, cache.text, expected)
    if len(cache.axes) > 1:
        raise OptionValueError(option, cache.text, "one axis for both, or axis_key=... and axis_value=...")
    said = [f"{key}={written(value)}" for key, value in cache.options.items()]
    candidates = []
    each: list[float | None] = [*cache.widths]
    for nbits in each or [None]:
        chosen: dict[str, Any] = {**shared, **preset, **start}
        if nbits is not None:
            chosen["nbits"] = nbits
        if cache.axes:
            chosen.update(axis_key=cache.axes[0], axis_value=cache.axes[0])
        own = {name: value for name, value in cache.options.items() if ALIASES.get(name, name) not in OPTIONS}
        general = {name: value for name, value in cache.options.items() if name not in own}
        chosen = overridden(chosen, rename_options(general, OPTIONS))
        if own:
            chosen["options"] = {**chosen.get("options", {}), **own}
        config = CacheConfig.from_dict(chosen)
        if check:
            layer_settings(config)  # refuse now what can be told to be impossible for every model
        width = [] if preset else [str(config.nbits)]
        candidates.append(Candidate(":".join([cache.name, *width, *cache.axes, *said]), "kvquant", chosen))
    return candidates


def transformers_nbits(backend: str, nbits: float | None, text: str, option: str) -> float:
    """Return the width of a backend of transformers' own quantised cache: its usual one where none is said.

    Args:
        backend: its name.
        nbits: what is said.
        text, option: what was written, and what messages call it.

    Raises:
        UnknownOptionError: there is no such backend.
        OptionValueError: it does not have this width.
    """
    if backend not in TRANSFORMERS_NBITS:
        raise UnknownOptionError("transformers backend", backend, TRANSFORMERS_NBITS)
    widths = TRANSFORMERS_NBITS[backend]
    if nbits is not None and nbits not in widths:
        raise OptionValueError(option, text, f"nbits from {listing(sorted(widths))} for {backend}")
    return widths[0] if nbits is None else nbits


def _transformers(cache: Written, option: str) -> list[Candidate]:
    if cache.axes:
        raise OptionValueError(option, cache.text, "axis_key and axis_value as integers, as transformers means them")
    backend = cache.names[1] if len(cache.names) > 1 else next(iter(TRANSFORMERS_NBITS))
    options = rename_options(cache.options, _TRANSFORMERS_OPTIONS)
    said = [f"{name}={written(value)}" for name, value in options.items()]
    candidates = []
    each: list[float | None] = [*cache.widths]
    for nbits in each or [None]:
        width = transformers_nbits(backend, nbits, cache.text, option)
        arguments = {_TRANSFORMERS_OPTIONS[name]: value for name, value in options.items()}
        if backend != "fp8":
            arguments["nbits"] = width
        elif options:
            raise OptionValueError(option, cache.text, "'transformers:fp8' without options: it has none")
        label = ":".join([_TRANSFORMERS, backend, str(width), *said])
        candidates.append(Candidate(label, _TRANSFORMERS, {"backend": backend, **arguments}))
    return candidates


def backend_exists(name: str) -> bool:
    """Whether there is a backend of this name, usable or not."""
    try:
        find_backend(name)
    except UnknownBackendError:
        return False
    except DuplicateBackendError:
        return True
    return True


def _require(name: str, *, usable: bool) -> None:
    try:
        backend = find_backend(name)
    except UnknownBackendError as cause:
        known = [*sorted(backend.name for backend in list_backends()), _TRANSFORMERS, *PRESETS]
        raise UnknownOptionError("backend", name, known) from cause
    if usable:
        backend.require()


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
        start, stop: the first of these tokens in view, and the first behind them, as `held_states` hands them out.
        numbers: numbers that are held quantised, those of tokens that are out of view too.
        bits_per_element: bits of codes, scales, offsets, tables and outliers for each of them.
        table_bits: those of tables among them, which do not grow with the tokens.
        axis: what shares a scale; None where transformers' integers say it.
    """

    start: int
    stop: int
    numbers: int
    bits_per_element: float
    table_bits: float
    axis: str | None


def quantized_streams(layer: Any) -> tuple[QuantizedStream, ...]:
    """Return what a layer has quantised of its keys and of its values; empty while there is nothing."""
    if isinstance(layer, QuantizedLayer):
        stores = layer.stores if layer.is_initialized else ()
        return tuple(_stream(store) for store in stores if store.body.held)
    if not isinstance(layer, OWN_QUANTIZED_LAYER) or layer._quantized_keys is None:
        return ()
    pair = [(states, layer._dequantize(states)) for states in (layer._quantized_keys, layer._quantized_values)]
    return tuple(
        QuantizedStream(0, read.shape[2], read.numel(), 8 * held_bytes(states) / read.numel(), 0.0, None)
        for states, read in pair
    )


def _stream(store: Store) -> QuantizedStream:
    body, start = store.body, store.sink_tokens
    numbers = body.held * store.batch * store.kv_heads * store.head_dim
    memory = layer_memory(0, 0, (body.held, numbers), store.parts())
    return QuantizedStream(
        start=start,
        stop=start + len(body),
        numbers=numbers,
        bits_per_element=memory.bits_per_element or 0.0,
        table_bits=8 * memory.parts["tables"] / numbers,
        axis=body.encoder.scheme.axis,
    )

"""What there is to choose: a width for the keys and one for the values of every quantised layer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from kvquant.cache.cache import QuantizedCache
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import PRESETS, CacheConfig, overridden
from kvquant.engine.options import layers_text
from kvquant.engine.packing import WIDTHS
from kvquant.engine.settings import layer_settings
from kvquant.engine.typed import parse_width
from kvquant.errors import ConfigError, OptionValueError, UnsupportedError, listing
from kvquant.evaluation.candidates import FULL, Candidate
from kvquant.evaluation.notation import read_cache, split_caches
from kvquant.evaluation.plan import planned_candidates
from kvquant.registry import get_backend

#: What is tuned where nobody says what: all but the bits of the preset that measured best for few bits.
DEFAULT_BASE = "smallest"

#: Bits a code takes.
Width = int | float
#: The widths of keys and values of one layer.
Pair = tuple[Width, Width]

_STREAMS = ("key", "value")


@dataclass(frozen=True)
class Stream:
    """The keys, or the values, of one layer.

    Attributes:
        layer: its number.
        name: ``"key"`` or ``"value"``.
    """

    layer: int
    name: str

    @property
    def index(self) -> int:
        """0 for keys, 1 for values."""
        return _STREAMS.index(self.name)


#: A width for every stream.
Assignment = Mapping[Stream, Width]


@dataclass(frozen=True)
class Space:
    """All assignments of widths to the streams of a model.

    Attributes:
        options: of the cache, without bits.
        widths: to choose from, rising.
        widest: what everything else has while one stream is measured: the most that the backend has.
        layers: layers that are quantised.
    """

    options: Mapping[str, Any]
    widths: tuple[Width, ...]
    widest: Width
    layers: tuple[int, ...]

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Keys and values, layer by layer."""
        return tuple(Stream(layer, name) for layer in self.layers for name in _STREAMS)

    def uniform(self, key: Width, value: Width) -> dict[Stream, Width]:
        """Return the assignment with one width for all keys, and one for all values."""
        return {stream: (key, value)[stream.index] for stream in self.streams}

    def alone(self, stream: Stream, width: Width) -> dict[Stream, Width]:
        """Return the assignment with `width` for one stream, and the most bits for all others."""
        return {**self.uniform(self.widest, self.widest), stream: width}

    def candidate(self, assignment: Assignment) -> Candidate:
        """Return the cache of an assignment, labelled with its widths."""
        return Candidate(label(assignment), "kvquant", self.config(assignment))

    def config(self, assignment: Assignment) -> dict[str, Any]:
        """Return the options of a cache: the commonest pair of widths for the whole cache, others by layer."""
        pairs = self.pairs(assignment)
        key, value = Counter(pairs.values()).most_common(1)[0][0]
        others: dict[Pair, list[int]] = defaultdict(list)
        for layer, pair in pairs.items():
            if pair != (key, value):
                others[pair].append(layer)
        layers = {
            layers_text(tuple(alike)): {"nbits_key": pair[0], "nbits_value": pair[1]} for pair, alike in others.items()
        }
        return {**self.options, "nbits": value, "nbits_key": key, "nbits_value": value, "layers": layers}

    def pairs(self, assignment: Assignment) -> dict[int, Pair]:
        """Return the widths of keys and values of each layer."""
        return {layer: (assignment[Stream(layer, "key")], assignment[Stream(layer, "value")]) for layer in self.layers}


def label(assignment: Assignment) -> str:
    """Return an assignment in a line: ``"keys 3,2,2 values 2,2,1"``."""
    widths = {
        name: ",".join(f"{width:g}" for stream, width in assignment.items() if stream.name == name) for name in _STREAMS
    }
    return f"keys {widths['key']} values {widths['value']}"


def parse_widths(text: str) -> tuple[Width, ...]:
    """Read widths separated by commas, and put them in order.

    Raises:
        OptionValueError: an item is no number of bits above 0, or there are not two.
    """
    try:
        found = sorted({parse_width(item.strip()) for item in text.split(",")})
    except ValueError:
        found = []
    if len(found) < 2 or not found[0]:
        raise OptionValueError("widths", text, "at least two widths separated by commas, such as 1,2,2.5,4")
    return tuple(found)


def tuning_options(text: str | None = None, shared: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the cache whose widths are tuned, and return its options without bits.

    Args:
        text: a backend without bits and with any options, or a preset, whose bits do not count; None for
            `DEFAULT_BASE`.
        shared: options of `CacheConfig` that `text` does not say itself; they go before those of `DEFAULT_BASE`.

    Raises:
        ConfigError, BackendError: see `parse_candidates`.
        OptionValueError: there are several caches, or bits are said.
    """
    if text is None:
        said = {name: value for name, value in (shared or {}).items() if value is not None}
        CacheConfig.from_dict(said)  # values that can never work are an error
        return _without_bits({"backend": CacheConfig().backend, **overridden(PRESETS[DEFAULT_BASE], said)})
    parts = split_caches(text)
    if len(parts) > 1 or parts == [FULL]:
        expected = f"one backend of kvquant with its options, or one preset of {listing(PRESETS)}"
        raise OptionValueError("backend", text, expected)
    cache = read_cache(text, "backend")
    if cache.names[0] == "transformers":
        raise OptionValueError("backend", text, "a cache of kvquant's: transformers' own has one width for all layers")
    if cache.widths or cache.says("nbits", "nbits_key", "nbits_value"):
        raise OptionValueError("backend", text, "a cache without bits, which --widths says and the tuner chooses")
    if cache.says("layers"):
        raise OptionValueError("layers", cache.options["layers"], "none: options by layer are what the tuner writes")
    return _without_bits(planned_candidates(text, shared=shared)[-1].options)


def _without_bits(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not name.startswith("nbits")}


def find_space(options: Mapping[str, Any], widths: tuple[Width, ...] | None, model: PreTrainedConfig) -> Space:
    """Find out which widths a backend has with these options, and which layers of a model it quantises.

    Args:
        options: of the cache, without bits.
        widths: to choose from; None takes all whole ones that there are.
        model: the model's config.

    Raises:
        OptionValueError: a width that the backend does not have with these options.
        UnsupportedError: fewer than two widths are there, or no layer of the model is quantised.
        ConfigError: an option cannot be honoured for this model.
    """
    backend = get_backend(CacheConfig.from_dict(options).backend)
    works = tuple(width for width in WIDTHS if _works(options, width))
    whole = tuple(width for width in works if width in backend.capabilities.nbits)
    chosen = whole if widths is None else widths
    for width in chosen:
        if width not in works:
            having = f"widths that {backend.name} has with these options: {listing(works)}"
            raise OptionValueError("widths", width, having)
    if len(chosen) < 2:
        reason = f"it has fewer than two widths to choose from: {listing(chosen)}"
        raise UnsupportedError(f"backend {backend.name!r}", [reason], "tuning")
    cache = QuantizedCache.from_config({**options, "nbits": max(works)}, model)
    layers = tuple(index for index, layer in enumerate(cache.layers) if isinstance(layer, QuantizedLayer))
    if not layers:
        raise UnsupportedError("this model", ["none of its layers is quantised with these options"], "tuning")
    return Space(dict(options), chosen, max(works), layers)


def _works(options: Mapping[str, Any], width: Width) -> bool:
    try:
        layer_settings(CacheConfig.from_dict({**options, "nbits": width}))
    except ConfigError:
        return False
    return True

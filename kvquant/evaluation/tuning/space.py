"""What there is to choose: a width for the keys and one for the values of every quantised layer."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from kvquant.cache.cache import QuantizedCache
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import PRESETS, CacheConfig
from kvquant.engine.options import layers_text
from kvquant.engine.settings import layer_settings
from kvquant.errors import ConfigError, OptionValueError, UnsupportedError
from kvquant.evaluation.candidates import Candidate
from kvquant.evaluation.plan import planned_candidates
from kvquant.registry import get_backend

#: What is tuned where nobody says what: all but the bits of what measured best for few bits.
DEFAULT_BASE = (
    "reference:scale=error:smoothing_key=true:smoothing_value=true:rotation_value=hadamard:scale_bits=8:group_size=64:"
    "sink_length=4"
)

#: Bits a code takes.
Width = int | float
#: The widths of keys and values of one layer.
Pair = tuple[Width, Width]

_STREAMS = ("key", "value")
_SAYS_BITS = re.compile(r":\s*(\d|nbits)")


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

    def __str__(self) -> str:
        return f"layer {self.layer} {self.name}s"


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
    """Read widths separated by commas.

    Raises:
        OptionValueError: an item is no number above 0, or there are not two.
    """
    try:
        found = {float(item) for item in text.split(",")}
    except ValueError:
        found = set()
    if len(found) < 2 or min(found) <= 0:
        raise OptionValueError("widths", text, "at least two widths separated by commas, such as 1,2,3,4")
    return tuple(int(width) if width.is_integer() else width for width in sorted(found))


def tuning_options(text: str, shared: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the cache whose widths are tuned, and return its options without bits.

    Args:
        text: a backend without bits and with any options, or a preset, whose bits do not count.
        shared: options of `CacheConfig` that `text` does not say itself.

    Raises:
        ConfigError, BackendError: see `parse_candidates`.
        OptionValueError: there are several caches, or bits are said.
    """
    if text.partition(":")[0].strip() == "transformers":
        raise OptionValueError("backend", text, "a cache of kvquant's: transformers' own has one width for all layers")
    if _SAYS_BITS.search(text):
        raise OptionValueError("backend", text, "a cache without bits, which --widths says and the tuner chooses")
    found = planned_candidates(text, shared=shared)[1:]
    options = [{name: value for name, value in one.options.items() if not name.startswith("nbits")} for one in found]
    if not options or any(one != options[0] for one in options) or any(one.kind != "kvquant" for one in found):
        presets = ", ".join(PRESETS)
        raise OptionValueError("backend", text, f"one backend of kvquant with its options, or one preset of {presets}")
    if options[0].get("layers"):
        raise OptionValueError("layers", options[0]["layers"], "none: options by layer are what the tuner writes")
    return options[0]


def find_space(options: Mapping[str, Any], widths: tuple[Width, ...] | None, model: PreTrainedConfig) -> Space:
    """Find out which widths a backend has with these options, and which layers of a model it quantises.

    Args:
        options: of the cache, without bits.
        widths: to choose from; None takes all that there are.
        model: the model's config.

    Raises:
        OptionValueError: a width that the backend does not have with these options.
        UnsupportedError: fewer than two widths are there, or no layer of the model is quantised.
        ConfigError: an option cannot be honoured for this model.
    """
    backend = get_backend(CacheConfig.from_dict(options).backend)
    works = tuple(width for width in sorted(backend.capabilities.nbits) if _works(options, width))
    chosen = works if widths is None else widths
    for width in chosen:
        if width not in works:
            having = f"widths that {backend.name} has with these options: {', '.join(f'{one:g}' for one in works)}"
            raise OptionValueError("widths", width, having)
    if len(chosen) < 2:
        reason = f"it has fewer than two widths to choose from: {', '.join(f'{one:g}' for one in works) or 'none'}"
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

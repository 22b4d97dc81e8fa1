"""The caches that can be compared: how they are named, made, and asked about what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers import QuantizedCache as TransformersQuantizedCache
from transformers.cache_utils import QuantizedLayer as TransformersQuantizedLayer

from kvquant.cache.cache import QuantizedCache
from kvquant.cache.layer import QuantizedLayer
from kvquant.errors import OptionValueError, UnknownOptionError, UnsupportedError
from kvquant.evaluation.measure import held_bytes

KINDS = ("dynamic", "transformers", "kvquant")
DEFAULT_NBITS = 4

#: Backends of transformers' own quantised cache and the widths that each has.
_TRANSFORMERS_NBITS = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8)}

_SYNTAX = "kind[:backend[:nbits]], such as dynamic, transformers:quanto:4 or kvquant:reference:2"


@dataclass(frozen=True)
class Contender:
    """A cache to be measured.

    Attributes:
        kind: one of `KINDS`.
        backend: name of the backend, empty for ``dynamic``.
        nbits: bits of a code, 0 for ``dynamic``.
    """

    kind: str
    backend: str = ""
    nbits: int = 0

    @property
    def label(self) -> str:
        """The cache's name in full, which `parse` takes."""
        return f"{self.kind}:{self.backend}:{self.nbits}" if self.backend else self.kind

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Read ``kind[:backend[:nbits]]``.

        Raises:
            UnknownOptionError: there is no such kind, or no such backend of transformers.
            OptionValueError: the rest does not fit the kind.
        """
        kind, *rest = text.strip().split(":")
        if kind not in KINDS:
            raise UnknownOptionError("cache kind", kind, KINDS)
        if kind == "dynamic":
            if rest:
                raise OptionValueError("caches", text, "'dynamic' alone: it has no backend")
            return cls(kind)
        if len(rest) > 2 or not all(rest):
            raise OptionValueError("caches", text, _SYNTAX)
        backend = rest[0] if rest else {"transformers": "quanto", "kvquant": "reference"}[kind]
        nbits = rest[1] if len(rest) > 1 else str(DEFAULT_NBITS)
        if not nbits.isdecimal():
            raise OptionValueError("caches", text, f"a whole number of bits at the end: {_SYNTAX}")
        if kind == "transformers":
            if backend not in _TRANSFORMERS_NBITS:
                raise UnknownOptionError("transformers backend", backend, _TRANSFORMERS_NBITS)
            widths = _TRANSFORMERS_NBITS[backend]
            if int(nbits) not in widths:
                raise OptionValueError("caches", text, f"nbits from {', '.join(map(str, widths))} for {backend}")
        return cls(kind, backend, int(nbits))

    def make(self, config: PreTrainedConfig) -> Cache:
        """Return an empty cache with the defaults of its library, for a model with this config."""
        if self.kind == "dynamic":
            return DynamicCache(config=config)
        if self.kind == "transformers":
            return TransformersQuantizedCache(self.backend, config, nbits=self.nbits)
        return QuantizedCache(self.backend, config, nbits=self.nbits)

    def why_not(self, config: PreTrainedConfig) -> str:
        """Return why the cache cannot be made here for a model with this config, empty if it can.

        Raises:
            ConfigError: it could not be made anywhere: the backend does not exist, or the number of bits does not.
        """
        try:
            self.make(config)
        except (ImportError, UnsupportedError) as cause:
            return one_line(cause)
        except ValueError as cause:
            if self.kind == "kvquant":
                raise
            return one_line(cause)
        return ""


def parse_contenders(text: str) -> tuple[Contender, ...]:
    """Read caches separated by commas.

    Raises:
        UnknownOptionError, OptionValueError: see `Contender.parse`; or one is named twice.
    """
    contenders = tuple(Contender.parse(part) for part in text.split(","))
    if len(set(contenders)) < len(contenders):
        raise OptionValueError("caches", text, "each cache once")
    return contenders


def one_line(error: BaseException) -> str:
    """Return an error's message as one line, with its type where there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


# ------------------------------------------------------------------------------------------------ a cache in use


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of all tensors that any cache holds."""
    return cache.nbytes if isinstance(cache, QuantizedCache) else held_bytes(*cache.layers)


@dataclass(frozen=True)
class Flush:
    """When a cache quantises again.

    Attributes:
        tokens_left: tokens to append until it does; the last of them is the one that costs.
        period: tokens from one time to the next.
    """

    tokens_left: int
    period: int


def next_flush(cache: Cache) -> Flush | None:
    """Return when tokens next leave a cache's window to be quantised; None for a cache that never quantises."""
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if isinstance(layer, QuantizedLayer):
            store, _ = layer.stores
            left = 1
            while not store.leaving(left):
                left += 1
            return Flush(left, store.body.encoder.block)
        if isinstance(layer, TransformersQuantizedLayer):
            waiting = layer.keys.shape[-2] if layer.keys.dim() == 4 else 0
            # It flushes when the window is full with the new tokens; no sooner than the next one.
            return Flush(max(1, layer.residual_length - waiting), layer.residual_length)
    return None

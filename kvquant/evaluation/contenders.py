"""The caches that can be compared: how they are named, made, and asked about what they hold."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers import QuantizedCache as TransformersQuantizedCache
from transformers.cache_utils import QuantizedLayer as TransformersQuantizedLayer

from kvquant.cache.cache import QuantizedCache
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.typed import looks_like_width, parse_width
from kvquant.errors import OptionValueError, UnknownOptionError, UnsupportedError
from kvquant.evaluation.measure import held_bytes

KINDS = ("dynamic", "static", "transformers", "turboquant", "kvquant")
DEFAULT_NBITS = 4

#: Kinds in full precision, which have neither backend nor bits.
_EXACT = ("dynamic", "static")
#: Backends of transformers' own quantised cache and the widths that each has; the first is the usual one.
_TRANSFORMERS_NBITS = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8), "fp8": (8,)}
#: Widths of the package turboquant's cache.
_TURBOQUANT_NBITS = (1, 2, 3, 4)

#: Backend or kind -> the distributions that its working depends on.
_DISTRIBUTIONS = {
    "quanto": ("optimum-quanto",),
    "hqq": ("hqq",),
    "bitsandbytes": ("bitsandbytes",),
    "turboquant": ("turboquant", "numpy"),  # 0.2.0 fails with numpy 2.4, which lacks `trapz`
}

_SYNTAX = "kind[:backend[:nbits]], such as dynamic, static, transformers:quanto:4 or kvquant:reference:2"


@dataclass(frozen=True)
class Contender:
    """A cache to be measured.

    Attributes:
        kind: one of `KINDS`.
        backend: name of the backend, empty where the kind has none.
        nbits: bits of a code, 0 in full precision.
    """

    kind: str
    backend: str = ""
    nbits: float = 0

    @property
    def label(self) -> str:
        """The cache's name in full, which `parse` takes."""
        return ":".join(str(part) for part in (self.kind, self.backend, self.nbits) if part)

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Read ``kind[:backend[:nbits]]``, or ``turboquant[:nbits]``.

        Raises:
            UnknownOptionError: there is no such kind, or no such backend of transformers.
            OptionValueError: the rest does not fit the kind.
        """
        kind, *rest = text.strip().split(":")
        if kind not in KINDS:
            raise UnknownOptionError("cache kind", kind, KINDS)
        if kind in _EXACT:
            if rest:
                raise OptionValueError("caches", text, f"{kind!r} alone: it has no backend")
            return cls(kind)
        if kind == "turboquant":
            rest = ["", *rest]
        if len(rest) > 2 or not all(rest[kind == "turboquant" :]):
            raise OptionValueError("caches", text, _SYNTAX)
        backend = rest[0] if rest else {"transformers": "quanto", "kvquant": "reference"}[kind]
        if kind == "transformers" and backend not in _TRANSFORMERS_NBITS:
            raise UnknownOptionError("transformers backend", backend, _TRANSFORMERS_NBITS)
        widths = {"transformers": _TRANSFORMERS_NBITS.get(backend, ()), "turboquant": _TURBOQUANT_NBITS}.get(kind, ())
        nbits = rest[1] if len(rest) > 1 else str(DEFAULT_NBITS if DEFAULT_NBITS in widths or not widths else widths[0])
        if not looks_like_width(nbits):
            raise OptionValueError("caches", text, f"a number of bits at the end: {_SYNTAX}")
        if widths and parse_width(nbits) not in widths:
            raise OptionValueError("caches", text, f"nbits from {', '.join(map(str, widths))} for {backend or kind}")
        return cls(kind, backend, parse_width(nbits))

    @property
    def is_rival(self) -> bool:
        """Whether it is a quantised cache that is not kvquant's."""
        return self.nbits > 0 and self.kind != "kvquant"

    def make(self, config: PreTrainedConfig, tokens: int) -> Cache:
        """Return an empty cache with the defaults of its library, for a model with this config.

        Args:
            config: the model's.
            tokens: what a cache of fixed size must have room for.
        """
        if self.kind == "dynamic":
            return DynamicCache(config=config)
        if self.kind == "static":
            return StaticCache(config=config, max_cache_len=tokens)
        if self.kind == "transformers":
            nbits = None if self.backend == "fp8" else self.nbits  # it has but one width, and takes no options
            return TransformersQuantizedCache(self.backend, config, nbits=nbits)
        if self.kind == "turboquant":
            made: Cache = importlib.import_module("turboquant").TurboQuantCache(bits=self.nbits)
            return made
        return QuantizedCache(self.backend, config, nbits=self.nbits)

    def why_not(self, config: PreTrainedConfig) -> str:
        """Return why the cache cannot be made here for a model with this config, empty if it can.

        Raises:
            ConfigError: it could not be made anywhere: the backend does not exist, or the number of bits does not.
        """
        try:
            self.make(config, 1)
        except (ImportError, UnsupportedError) as cause:
            return one_line(cause) + (" (pip install turboquant)" if self.kind == "turboquant" else "")
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


def versions(contenders: Iterable[Contender]) -> dict[str, str]:
    """Return the versions of the packages that some of the caches need, where they are installed."""
    needed = {contender.backend or contender.kind for contender in contenders}
    found = {}
    for distribution in (one for name in _DISTRIBUTIONS if name in needed for one in _DISTRIBUTIONS[name]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[distribution] = importlib.metadata.version(distribution)
    return found


def one_line(error: BaseException) -> str:
    """Return an error's message as one line, with its type where there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


# ------------------------------------------------------------------------------------------------ a cache in use


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of all tensors that any cache holds."""
    return cache.nbytes if isinstance(cache, QuantizedCache) else held_bytes(*cache.layers)


def read_bytes(cache: Cache) -> int:
    """Return the bytes that attention over a cache must read at least: all that it holds, without spare room."""
    if not isinstance(cache, QuantizedCache):
        return cache_bytes(cache)
    report = cache.memory_report()
    return report.nbytes - report.parts["spare"]


def attention_of(cache: Cache) -> str:
    """Return what attends over the quantised tokens of one of kvquant's caches, in words; empty for others."""
    return cache.memory_report().attention if isinstance(cache, QuantizedCache) else ""


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

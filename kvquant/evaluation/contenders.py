"""The caches that are benched: how they are named, and made."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers import QuantizedCache as TransformersQuantizedCache

from kvquant.cache.cache import QuantizedCache
from kvquant.engine.config import CacheConfig
from kvquant.engine.typed import looks_like_width, parse_width
from kvquant.errors import OptionValueError, UnknownOptionError, UnsupportedError, listing
from kvquant.evaluation.candidates import backend_exists, is_preset, parse_candidates, transformers_nbits
from kvquant.evaluation.failures import one_line
from kvquant.evaluation.notation import read_cache, split_caches

KINDS = ("dynamic", "static", "transformers", "turboquant", "kvquant")
DEFAULT_NBITS = 4

#: Kinds in full precision, which have neither backend nor bits.
_EXACT = ("dynamic", "static")
#: Kinds with backends, and the usual one of each.
_BACKENDS = {"transformers": "quanto", "kvquant": "reference"}
#: Widths of the package turboquant's cache.
_TURBOQUANT_NBITS = (1, 2, 3, 4)

#: Backend or kind -> the distributions that its working depends on.
_DISTRIBUTIONS = {
    "quanto": ("optimum-quanto",),
    "hqq": ("hqq",),
    "bitsandbytes": ("bitsandbytes",),
    "turboquant": ("turboquant", "numpy"),  # 0.2.0 fails with numpy 2.4, which lacks `trapz`
}

_SYNTAX = (
    "kind[:backend[:nbits]], such as dynamic, static, transformers:quanto:4 or kvquant:reference:2, with options as "
    "kvquant:reference:2:scale=error:sink_length=4, or a preset as kvquant:smallest"
)


@dataclass(frozen=True)
class Contender:
    """A cache to be measured.

    Attributes:
        kind: one of `KINDS`.
        backend: name of the backend, empty where the kind has none.
        nbits: bits of a code, 0 in full precision.
        name: its name in full where more is said of it: options, or a preset.
        options: then, those of a `CacheConfig`, or the arguments of transformers' cache. No part of a comparison, as
            values may be lists; `name` has them.
    """

    kind: str
    backend: str = ""
    nbits: float = 0
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def label(self) -> str:
        """The cache's name in full, which `parse` takes."""
        return self.name or ":".join(str(part) for part in (self.kind, self.backend, self.nbits) if part)

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Read ``kind[:backend[:nbits]]``, or ``turboquant[:nbits]``.

        For the kinds ``kvquant`` and ``transformers``, what stands behind is read as `parse_candidates` does it:
        options and presets too. Whether a backend can be used here only `why_not` says.

        Raises:
            UnknownOptionError: there is no such kind, or no such backend.
            OptionValueError: the rest does not fit the kind, or a value can never work.
        """
        kind, *rest = text.strip().split(":")
        if kind not in KINDS:
            raise UnknownOptionError("cache kind", kind, KINDS)
        if kind in _BACKENDS:
            return cls._with_backend(text, kind, ":".join(rest) if rest else _BACKENDS[kind])
        if kind in _EXACT:
            if rest:
                raise OptionValueError("caches", text, f"{kind!r} alone: it has no backend")
            return cls(kind)
        if len(rest) > 1 or not all(rest):
            raise OptionValueError("caches", text, _SYNTAX)
        nbits = rest[0] if rest else str(DEFAULT_NBITS)
        if not looks_like_width(nbits) or parse_width(nbits) not in _TURBOQUANT_NBITS:
            raise OptionValueError("caches", text, f"nbits from {listing(_TURBOQUANT_NBITS)} for {kind}")
        return cls(kind, nbits=parse_width(nbits))

    @classmethod
    def _with_backend(cls, text: str, kind: str, rest: str) -> Contender:
        """Read a cache of kvquant's or of transformers' own, without its kind."""
        written = read_cache(rest, "caches", _SYNTAX)
        if len(written.names) > 1 and (kind != "kvquant" or not backend_exists(written.name)):
            raise OptionValueError("caches", text, _SYNTAX)
        if len(written.widths) > 1:
            raise OptionValueError("caches", text, f"one number of bits: {_SYNTAX}")
        nbits = written.widths[0] if written.widths else None
        if not written.options and not written.axes and len(written.names) == 1 and not is_preset(written):
            if kind == "transformers":
                return cls(kind, written.name, transformers_nbits(written.name, nbits, text, "caches"))
            return cls(kind, written.name, DEFAULT_NBITS if nbits is None else nbits)
        whole = rest if kind == "kvquant" else f"{kind}:{rest}"
        _, candidate = parse_candidates(whole, option="caches", check=False)
        options = dict(candidate.options)
        if kind == "transformers":
            return cls(kind, options["backend"], options["nbits"], candidate.label, options)
        config = CacheConfig.from_dict(options)
        return cls(kind, config.backend, config.nbits, f"{kind}:{candidate.label}", options)

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
            if self.options:
                return TransformersQuantizedCache(config=config, **self.options)
            nbits = None if self.backend == "fp8" else self.nbits  # it has but one width, and takes no options
            return TransformersQuantizedCache(self.backend, config, nbits=nbits)
        if self.kind == "turboquant":
            made: Cache = importlib.import_module("turboquant").TurboQuantCache(bits=self.nbits)
            return made
        if self.options:
            return QuantizedCache.from_config(self.options, config)
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
    contenders = tuple(Contender.parse(part) for part in split_caches(text))
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

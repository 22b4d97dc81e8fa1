"""What runs the ways of generating, and what comes of it: `Mode`, `Caches`, `ModeResult`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig

from kvquant.attention.counters import counters
from kvquant.cache.cache import QuantizedCache
from kvquant.cache.encoder_decoder import QuantizedEncoderDecoderCache
from kvquant.cache.layers import memory_of
from kvquant.errors import KVQuantError

#: Options with which nothing is quantised, an encoder's states included, and with which most tokens are.
ALL_EXACT = {"residual_length": 4096, "sink_length": 4096}
MOST_QUANTISED = {"residual_length": 32}

_SEED = 7


class Caches:
    """Makes the caches of one run, and remembers them.

    Attributes:
        options: options of a `QuantizedCache`; None for transformers' `DynamicCache`.
        made: every cache made, or seen (`seen`).
    """

    def __init__(self, options: Mapping[str, Any] | None) -> None:
        """Make none yet."""
        self.options = options
        self.made: list[Cache] = []

    def new(self, config: PreTrainedConfig) -> Cache:
        """Return an empty cache for a model of this config."""
        if config.is_encoder_decoder:
            if self.options is None:
                return self.seen(EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)))
            return self.seen(QuantizedEncoderDecoderCache(config=config, **self.options))
        if self.options is None:
            return self.seen(DynamicCache(config=config))
        return self.seen(QuantizedCache(config=config, **self.options))

    def seen(self, cache: Cache) -> Cache:
        """Remember a cache that something else has made, and return it."""
        self.made.append(cache)
        return cache

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of the layer that holds most quantised ones, and how many of them are quantised."""
        memories = [memory_of(0, layer) for cache in self.made for layer in _layers(cache)]
        return max(
            ((each.tokens, each.quantized_tokens) for each in memories), key=lambda two: two[::-1], default=(0, 0)
        )


def _layers(cache: Cache) -> list[Any]:
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    inner = [layer for part in parts if part is not None for layer in part.layers]
    return inner or list(cache.layers)


@dataclass(frozen=True)
class Mode:
    """A way of generating.

    Attributes:
        name: what the table calls it.
        run: does it with caches of the kind it is given, and returns what can be compared: token ids, or numbers.
        note: what a reader of the table should know.
        reason: why it takes no cache of ours at all, whatever one does; then there is no `run`.
    """

    name: str
    run: Callable[[Caches], Tensor] | None = None
    note: str = ""
    reason: str = ""


@dataclass(frozen=True)
class ModeResult:
    """What came of a mode.

    Attributes:
        mode: its name.
        equal: whether it gave what it gives with a `DynamicCache`, with everything in the window.
        tokens: tokens in the cache after the run with most of them quantised.
        quantized: how many of them were quantised.
        fused: how often attention read packed tokens in that run.
        dequantized: how often the keys or the values of a layer were dequantised whole.
        note: what a reader should know.
        missing: why it cannot be run here, whatever the cache.
        error: what went wrong, where something did.
    """

    mode: str
    equal: bool | None = None
    tokens: int = 0
    quantized: int = 0
    fused: int = 0
    dequantized: int = 0
    note: str = ""
    missing: str = ""
    error: str = ""

    @property
    def works(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.error and (bool(self.missing) or (self.equal is True and self.quantized > 0))

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins."""
        return {**dataclasses.asdict(self), "works": self.works}


def run_modes(modes: Iterable[Mode], options: Mapping[str, Any]) -> Iterator[ModeResult]:
    """Run modes one after the other, each with three kinds of cache, and yield what came of each.

    Args:
        modes: what to run.
        options: options of the `QuantizedCache`, but for its residual length.
    """
    for mode in modes:
        yield _result(mode, options)


def _result(mode: Mode, options: Mapping[str, Any]) -> ModeResult:
    if mode.run is None:
        return ModeResult(mode.name, note=mode.note, missing=mode.reason)
    try:
        expected = _seeded(mode.run, Caches(None))
    except Exception as problem:  # noqa: BLE001 # whatever it is, it has nothing to do with our cache
        said = "" if isinstance(problem, KVQuantError) else "transformers says: "
        return ModeResult(mode.name, note=mode.note, missing=said + _first_line(problem))
    try:
        exact = _seeded(mode.run, Caches({**options, **ALL_EXACT}))
        counters.reset()
        caches = Caches({**options, **MOST_QUANTISED})
        quantised = _seeded(mode.run, caches)
    except Exception as problem:  # noqa: BLE001 # a table of what works has a line for what does not
        return ModeResult(mode.name, note=mode.note, error=f"{type(problem).__name__}: {_first_line(problem)}")
    tokens, quantized = caches.tokens
    error = "" if quantised.numel() and bool(quantised.isfinite().all()) else "with the body in use it gave nothing"
    return ModeResult(
        mode.name,
        _same(exact, expected),
        tokens,
        quantized,
        counters.fused,
        counters.materialised,
        mode.note,
        "",
        error,
    )


def _seeded(run: Callable[[Caches], Tensor], caches: Caches) -> Tensor:
    torch.manual_seed(_SEED)
    return run(caches)


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    if found.is_floating_point():
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    return torch.equal(found, expected)


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0] or type(problem).__name__

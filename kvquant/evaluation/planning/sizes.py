"""What a cache takes with so many tokens in it, layer by layer."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from kvquant.cache.cache import QuantizedCache
from kvquant.cache.layer import QuantizedLayer
from kvquant.cache.layers import memory_of
from kvquant.engine.encode import Encoder
from kvquant.engine.memory import PARTS, LayerMemory, MemoryReport, layer_memory
from kvquant.engine.window import WindowPolicy
from kvquant.evaluation.candidates import FULL, Candidate
from kvquant.evaluation.planning.layouts import Layout, find_layout
from kvquant.evaluation.planning.model import LayerStates, ModelShape
from kvquant.evaluation.planning.occupancy import occupancy

#: Beyond so many tokens a cache that still fits is taken to fit for ever: one without full attention.
ENDLESS = 1 << 32


class _Layer(Protocol):
    """What one layer takes."""

    def memory(self, tokens: int) -> LayerMemory:
        """Return its memory with `tokens` tokens in it."""

    def fullest(self, tokens: int) -> tuple[int, ...]:
        """Return the next lengths, from `tokens` on, at one of which it takes as much as at any length before."""


def _arrival(tokens: int, decode: int) -> tuple[int, int]:
    """Return how many tokens come at once, one at least, and how many come one at a time."""
    decoded = min(decode, tokens - 1)
    return tokens - decoded, decoded


@dataclass(frozen=True)
class _ExactLayer:
    """A layer of transformers' own, filled on the meta device, where tensors have shapes and no numbers."""

    empty: Any
    states: LayerStates
    batch: int
    decode: int

    def memory(self, tokens: int) -> LayerMemory:
        layer = copy.deepcopy(self.empty)
        if self.states.shapes is not None:
            # One token at the end does what many do: each makes the tensors anew, as large as they must be.
            prefill, decoded = _arrival(tokens, min(1, self.decode))
            for added in (prefill, *[1] * decoded):
                layer.update(*self.states.like(self.batch, added, torch.device("meta")))
        memory = memory_of(0, layer)
        beside = self.states.fixed + tokens * self.states.growing
        parts = {**memory.parts, "full precision": memory.parts["full precision"] + beside}
        return replace(memory, tokens=tokens, parts=parts)

    def fullest(self, tokens: int) -> tuple[int, ...]:
        return (tokens,)


@dataclass(frozen=True)
class _Stream:
    """The keys, or the values, of a quantised layer."""

    layout: Layout
    heads: int
    channels: int
    token_bytes: int  # of one token of one batch row in full precision
    smoothing_bytes: int  # of what one batch row is smoothed by


@dataclass(frozen=True)
class _QuantizedLayer:
    """A layer of kvquant's."""

    policy: WindowPolicy
    streams: tuple[_Stream, _Stream]
    batch: int
    decode: int

    def memory(self, tokens: int) -> LayerMemory:
        held = occupancy(self.policy, *_arrival(tokens, self.decode))
        parts = Counter[str](dict.fromkeys(PARTS, 0))
        for stream in self.streams:
            row = self.batch * stream.token_bytes
            recent = held.recent
            parts.update({"sink": held.sink * row, "window": len(recent) * row})
            parts.update({"spare": (recent.capacity - len(recent)) * row})
            parts.update(stream.layout.parts(held, self.batch, stream.heads))
        if held.pages:
            parts["tables"] += sum(self.batch * stream.smoothing_bytes for stream in self.streams)
            shared = [(one.layout.shared_part, tensor) for one in self.streams for tensor in one.layout.shared]
            memory = layer_memory(0, 0, (0, 0), [(part, tensor, tensor.nbytes) for part, tensor in shared])
            parts.update(memory.parts)
        elements = self.batch * held.body * sum(stream.heads * stream.channels for stream in self.streams)
        return LayerMemory(0, tokens, held.body, elements, dict(parts))

    def fullest(self, tokens: int) -> tuple[int, ...]:
        """Return the next length at which the window is as full as it gets, and that at which the prefill left it so.

        In between, the window fills up; with the second, another block has come with the prefill, in its own page.
        """
        most, block = self.policy.most_recent, self.policy.block
        if tokens <= most:
            return (tokens,)
        if self.policy.span is not None and tokens > self.policy.span:
            # Pages come and go, and are made when the window has become so full; a round of them takes so many blocks.
            made = tokens + (most + 1 - tokens) % block
            return tuple(range(made, made + self.policy.page_capacity(0, 0) + block, block))
        return tokens + (most - tokens) % block, tokens + (most + self.decode - tokens) % block

    def widest(self) -> _QuantizedLayer:
        """Return the same with the wider scales everywhere."""
        key, value = (replace(stream, layout=stream.layout.widest()) for stream in self.streams)
        return replace(self, streams=(key, value))


@dataclass(frozen=True)
class CacheSizes:
    """What a cache takes, for any number of tokens.

    Attributes:
        layers: what each layer is; those that are alike are one object.
    """

    layers: tuple[_Layer, ...]

    def report(self, tokens: int) -> MemoryReport:
        """Return the memory of a cache with `tokens` tokens in it, as the cache itself would report it."""
        made = {id(layer): layer.memory(tokens) for layer in self.layers}
        return MemoryReport(tuple(replace(made[id(layer)], layer=at) for at, layer in enumerate(self.layers)))

    def nbytes(self, tokens: int) -> int:
        """Return the bytes of a cache with `tokens` tokens in it."""
        return self._sum(lambda layer: layer.memory(tokens).nbytes)

    def most(self, tokens: int) -> int:
        """Return the bytes that a cache takes at most on its way to `tokens` tokens, and up to a block beyond.

        Between two flushes a window fills up with exact tokens, so that a cache shrinks when it quantises them.
        """
        return self.fullest(tokens).nbytes

    def fullest(self, tokens: int) -> MemoryReport:
        """Return the memory of a cache whose every layer takes as much as it does at most on its way, see `most`."""
        made = {
            id(layer): max((layer.memory(length) for length in layer.fullest(tokens)), key=lambda memory: memory.nbytes)
            for layer in self.layers
        }
        return MemoryReport(tuple(replace(made[id(layer)], layer=at) for at, layer in enumerate(self.layers)))

    def longest(self, budget: int) -> int | None:
        """Return the most tokens up to which a cache takes no more than `budget` bytes; None if it never takes more."""
        if self.most(1) > budget:
            return 0
        fits, over = 1, 2
        while self.most(over) <= budget:
            fits, over = over, 2 * over
            if over > ENDLESS:
                return None
        while over - fits > 1:
            middle = (fits + over) // 2
            fits, over = (middle, over) if self.most(middle) <= budget else (fits, middle)
        return fits

    def widest(self) -> CacheSizes:
        """Return the sizes where all scales need the wider of their two types."""
        wider = {id(one): one.widest() if isinstance(one, _QuantizedLayer) else one for one in self.layers}
        return CacheSizes(tuple(wider[id(layer)] for layer in self.layers))

    def _sum(self, measure: Callable[[_Layer], int]) -> int:
        counts = Counter(map(id, self.layers))
        kinds = {id(layer): layer for layer in self.layers}
        return sum(counts[kind] * measure(layer) for kind, layer in kinds.items())


def cache_sizes(candidate: Candidate, model: ModelShape, decode: int, device: torch.device) -> CacheSizes:
    """Find out what a cache is made of.

    Args:
        candidate: full precision, or one of kvquant's.
        model: what is to be cached.
        decode: tokens that come one at a time, behind all others, which come at once.
        device: where a backend quantises a little data to show how it writes it down.

    Raises:
        ConfigError: an option cannot be honoured for this model.
        BackendError, QuantizationError, BackendContractError: the backend cannot be used, or fails.
    """
    is_full = candidate.kind == FULL
    made = DynamicCache(config=model.config) if is_full else QuantizedCache.from_config(candidate.options, model.config)
    known: dict[str, _Layer] = {}
    layers = []
    for index, (layer, states) in enumerate(zip(made.layers, model.layers, strict=True)):
        quantized = isinstance(layer, QuantizedLayer)
        options = made.config.layer_options(index) if quantized else _own_settings(layer)
        key = json.dumps([type(layer).__name__, options, repr(states)], sort_keys=True, default=str)
        if key not in known:
            known[key] = (
                _quantized(layer, states, model.batch, decode, device)
                if quantized
                else _ExactLayer(layer, states, model.batch, decode)
            )
        layers.append(known[key])
    return CacheSizes(tuple(layers))


def _own_settings(layer: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if isinstance(value, int)}


def _quantized(
    layer: QuantizedLayer, states: LayerStates, batch: int, decode: int, device: torch.device
) -> _QuantizedLayer:
    like = states.like(1, 0, device)
    layer.lazy_initialization(*like)
    encoders: Sequence[Encoder] = [store.body.encoder for store in layer.stores]
    policy = layer.policy(*(encoder.scheme for encoder in encoders))
    key, value = (
        _Stream(
            find_layout(encoder, empty),
            empty.shape[1],
            empty.shape[3],
            empty.shape[1] * empty.shape[3] * empty.element_size(),
            2 * empty.shape[1] * empty.shape[3] * torch.float16.itemsize if encoder.smooths else 0,
        )
        for encoder, empty in zip(encoders, like, strict=True)
    )
    return _QuantizedLayer(policy, (key, value), batch, decode)

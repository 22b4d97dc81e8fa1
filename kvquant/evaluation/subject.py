"""What caches are measured with: a model, or attention alone. A cache is filled with synthetic states, then decodes."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvquant.cache.compat import given
from kvquant.errors import ModelLoadError, OptionValueError, UnsupportedError
from kvquant.evaluation.in_use import attention_of, cache_bytes, next_flush, read_bytes
from kvquant.evaluation.measure import seconds, timed

DTYPES = ("float32", "bfloat16", "float16")

#: Positions that the way to the next flush may take, for the windows that all libraries have by default.
_FLUSH_ROOM = 512


@dataclass(frozen=True)
class SyntheticModel:
    """Shape of a Llama with random weights; its vocabulary is small because it has nothing to do with caches."""

    layers: int = 2
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64

    def config(self, positions: int) -> LlamaConfig:
        """Return the config of the model, with room for so many tokens."""
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=1024,
            max_position_embeddings=positions,
        )

    def make(self, positions: int) -> PreTrainedModel:
        """Return the model, on the CPU in float32."""
        return LlamaForCausalLM(self.config(positions))


@dataclass
class Round:
    """One fill and some decode steps of one cache.

    Attributes:
        fill: seconds to append the whole history to all layers.
        held: bytes of the cache's tensors with the history in.
        read: bytes of them that attention must read at least.
        kernel: what attends, see `in_use.attention_of`.
        steps: seconds of each decode step.
        attention: seconds of each step's attention alone, without the update; empty where it cannot be told apart.
        flush: seconds of a decode step in which tokens leave the window and are quantised, None if there is none.
        flush_period: tokens from one flush to the next.
        tokens: in the cache at the end.
    """

    fill: float
    held: int
    read: int
    kernel: str
    steps: list[float]
    attention: list[float]
    flush: float | None
    flush_period: int | None
    tokens: int

    @property
    def amortised(self) -> float:
        """Seconds of a decode step with its share of a flush."""
        step = statistics.median(self.steps)
        if self.flush is None or not self.flush_period:
            return step
        return step + (self.flush - step) / self.flush_period


@dataclass(frozen=True)
class Step:
    """Seconds of a decode step, and of its attention alone where that can be told apart."""

    whole: float
    attention: float | None = None


@dataclass(frozen=True)
class Prefill:
    """Seconds of a model's prefill, and the part of them that the cache took."""

    whole: float
    cache: float


class Subject(ABC):
    """What caches are measured with: something that decodes tokens over them.

    Attributes:
        device: where it is.
        config: the config that caches are made for.
        dtype: of states.
        batch: sequences at once.
        seed: of states.
    """

    device: torch.device
    config: PreTrainedConfig
    dtype: torch.dtype
    batch: int
    seed: int

    @property
    @abstractmethod
    def shapes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """``(kv_heads, head_dim)`` of keys and of values for each layer."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what matters of it, as plain builtins."""

    @abstractmethod
    def decode(self, cache: Cache) -> Step:
        """Decode a token."""

    def history(self, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Return random states ``[batch, kv_heads, tokens, head_dim]`` for each layer; layers alike share them."""
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def states(shape: tuple[int, int]) -> Tensor:
            size = (self.batch, shape[0], tokens, shape[1])
            return torch.randn(size, generator=generator, device=self.device, dtype=self.dtype)

        made = {pair: (states(pair[0]), states(pair[1])) for pair in dict.fromkeys(self.shapes)}
        return [made[pair] for pair in self.shapes]

    def fill(self, cache: Cache, history: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Append a history to all layers of a cache, and return the seconds that it took."""

        def append() -> None:
            for layer, (keys, values) in enumerate(history):
                if keys.shape[2]:
                    cache.update(keys, values, layer)

        with torch.no_grad():
            return seconds(append, self.device)

    def run(self, cache: Cache, history: Sequence[tuple[Tensor, Tensor]], steps: int) -> Round:
        """Fill an empty cache with states, then decode, see `decode_steps`."""
        return self.decode_steps(cache, history, steps, self.fill(cache, history))

    def decode_steps(
        self, cache: Cache, history: Sequence[tuple[Tensor, Tensor]], steps: int, filled: float = 0.0
    ) -> Round:
        """Decode `steps` tokens over a cache that has its history, and one more with a flush where there is one."""
        held, read, kernel = cache_bytes(cache), read_bytes(cache), attention_of(cache)
        with torch.no_grad():
            self.decode(cache)  # the first step after a fill finds cold memory and makes room: not a typical one
            made = [self.decode(cache) for _ in range(steps)]
            flush = None
            coming = next_flush(cache)
            if coming is not None:
                self.fill(cache, _taken(history, coming.tokens_left - 1))
                flush = self.decode(cache).whole
        return Round(
            fill=filled,
            held=held,
            read=read,
            kernel=kernel,
            steps=[step.whole for step in made],
            attention=[step.attention for step in made if step.attention is not None],
            flush=flush,
            flush_period=None if coming is None else coming.period,
            tokens=int(cache.get_seq_length()),
        )


class ModelSubject(Subject):
    """A whole model.

    Attributes:
        model: the model.
    """

    def __init__(
        self, model: str | SyntheticModel, tokens: int, dtype: str, device: str, seed: int, batch: int = 1
    ) -> None:
        """Load or make the model, and run it once.

        Args:
            model: name or folder of a model, or the shape of one with random weights.
            tokens: the most tokens that will be in a cache before the flush that ends a round.
            dtype: name of the floating type of weights and states.
            device: torch device.
            seed: of weights and states.
            batch: sequences at once.

        Raises:
            OptionValueError: the model has fewer positions.
            UnsupportedError: it has layers whose state is not one of keys and values.
            ModelLoadError: it cannot be loaded.
        """
        self.seed, self.device, self.batch = seed, torch.device(device), batch
        positions = tokens + _FLUSH_ROOM
        torch.manual_seed(seed)
        if isinstance(model, str):
            self._name = model
            try:
                loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
            except (OSError, ValueError) as cause:
                raise ModelLoadError(model, cause) from cause
            longest = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None)
            if longest is not None and longest < positions:
                expected = f"at most {max(0, longest - _FLUSH_ROOM)} tokens, decoded ones included, for {model!r}"
                raise OptionValueError("contexts", tokens, expected)
        else:
            self._name, loaded = "random weights", model.make(positions)
        self.model = loaded.to(device=self.device, dtype=getattr(torch, dtype)).eval()
        self.config, self.dtype = self.model.config, self.model.dtype
        self._token = torch.ones((batch, 1), dtype=torch.int64, device=self.device)
        self._shapes = self._state_shapes()

    @property
    def shapes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """``(kv_heads, head_dim)`` of keys and of values for each layer."""
        return self._shapes

    def describe(self) -> dict[str, Any]:
        """Return what matters of the model, as plain builtins."""
        config = self.config.get_text_config(decoder=True)
        (kv_heads, head_dim), _ = self._shapes[0]
        return {
            "name": self._name,
            "architecture": type(self.model).__name__,
            "layers": len(self._shapes),
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": config._attn_implementation,
        }

    def _state_shapes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Return the shapes as a short run through the model shows them."""
        cache = DynamicCache(config=self.config)
        with torch.no_grad():
            self.model(input_ids=self._token.expand(self.batch, 2), use_cache=True, **given(self.model, cache))
        shapes = []
        for index, layer in enumerate(cache.layers):
            pair = [getattr(layer, name, None) for name in ("keys", "values")]
            if not all(isinstance(states, Tensor) and states.dim() == 4 for states in pair):
                reason = f"layer {index} is a {type(layer).__name__}, which takes no synthetic states"
                raise UnsupportedError("this model", [reason], "bench")
            keys, values = ((states.shape[1], states.shape[3]) for states in pair if states is not None)
            shapes.append((keys, values))
        return shapes

    def decode(self, cache: Cache) -> Step:
        """Run a token through the model."""
        return Step(seconds(lambda: self._forward(self._token, cache), self.device))

    def prefill(self, cache: Cache, tokens: int) -> Prefill:
        """Run random tokens through the model into an empty cache."""
        ids = torch.randint(
            self.config.get_text_config(decoder=True).vocab_size,
            (self.batch, tokens),
            generator=torch.Generator().manual_seed(self.seed),
        ).to(self.device)
        update, inside = cache.update, 0.0

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            result, taken = timed(lambda: update(*args, **kwargs), self.device)
            inside += taken
            return result

        cache.update = watched
        with torch.no_grad():
            whole = seconds(lambda: self._forward(ids, cache, logits_to_keep=1), self.device)
        return Prefill(whole, inside)

    def _forward(self, ids: Tensor, cache: Cache, **options: Any) -> None:
        self.model(input_ids=ids, use_cache=True, **given(self.model, cache), **options)


class _Layer(torch.nn.Module):
    """What transformers' attention function asks of an attention layer."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


class AttentionSubject(Subject):
    """Nothing but cache and attention: for each layer an update by one token, and attention for one query token.

    Attention is called as transformers' models call it, by its function for ``sdpa``.
    """

    def __init__(self, shape: SyntheticModel, tokens: int, dtype: str, device: str, seed: int, batch: int = 1) -> None:
        """Make random queries and states.

        Args:
            shape: layers, heads and channels; `hidden` plays no part.
            tokens: the most tokens that will be in a cache.
            dtype: name of the floating type of the states.
            device: torch device.
            seed: of the numbers.
            batch: sequences at once.
        """
        self.seed, self.device, self.batch = seed, torch.device(device), batch
        self.dtype, self._shape = getattr(torch, dtype), shape
        self.config = shape.config(tokens + _FLUSH_ROOM)
        self._layer = _Layer(shape.heads // shape.kv_heads)
        generator = torch.Generator().manual_seed(seed)
        size = (batch, shape.heads + 2 * shape.kv_heads, 1, shape.head_dim)
        states = torch.randn(size, generator=generator).to(self.device, self.dtype)
        self._query, self._keys, self._values = states.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)

    @property
    def shapes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """``(kv_heads, head_dim)`` of keys and of values for each layer."""
        states = (self._shape.kv_heads, self._shape.head_dim)
        return [(states, states)] * self._shape.layers

    def describe(self) -> dict[str, Any]:
        """Return what matters of the shape, as plain builtins."""
        shown = {name: value for name, value in vars(self._shape).items() if name != "hidden"}
        dtype = str(self.dtype).removeprefix("torch.")
        return {"name": "cache and attention alone", "architecture": None, **shown, "dtype": dtype, "attention": "sdpa"}

    def decode(self, cache: Cache) -> Step:
        """Update each layer, and attend."""
        layers = [self._decode_layer(cache, layer) for layer in range(self._shape.layers)]
        updating, attending = (sum(parts) for parts in zip(*layers, strict=True))
        return Step(updating + attending, attending)

    def _decode_layer(self, cache: Cache, layer: int) -> tuple[float, float]:
        """Return the seconds of the update and of the attention."""
        (keys, values), updating = timed(lambda: cache.update(self._keys, self._values, layer), self.device)
        length, mask = int(cache.get_seq_length(layer)), None
        if keys.shape[2] != length:  # a cache of fixed size: what lies behind its end is hidden, as by a model
            mask = (torch.arange(keys.shape[2], device=self.device) < length)[None, None, None]
        _, attending = timed(lambda: sdpa_attention_forward(self._layer, self._query, keys, values, mask), self.device)
        return updating, attending


def _taken(history: Sequence[tuple[Tensor, Tensor]], tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Return states of `tokens` tokens out of the history, again from its start where it is shorter."""
    index = torch.arange(tokens) % history[0][0].shape[2]
    return [(keys[:, :, index], values[:, :, index]) for keys, values in history]

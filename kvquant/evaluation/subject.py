"""A model to decode with, and one round of it: a cache is filled with synthetic states and decodes real tokens."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kvquant.errors import ModelLoadError, OptionValueError, UnsupportedError
from kvquant.evaluation.contenders import cache_bytes, next_flush
from kvquant.evaluation.measure import seconds

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

    def make(self, positions: int) -> PreTrainedModel:
        """Return the model, on the CPU in float32."""
        config = LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=1024,
            max_position_embeddings=positions,
        )
        return LlamaForCausalLM(config)


@dataclass
class Round:
    """One fill and some decode steps of one cache.

    Attributes:
        fill: seconds to append the whole history to all layers.
        held: bytes of the cache's tensors with the history in.
        steps: seconds of each decode step.
        flush: seconds of a decode step in which tokens leave the window and are quantised, None if there is none.
        flush_period: tokens from one flush to the next.
        tokens: in the cache at the end.
    """

    fill: float
    held: int
    steps: list[float]
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


class Subject:
    """A model, and the shapes of the states that its layers cache.

    Attributes:
        model: the model.
        device: where it is.
    """

    def __init__(self, model: str | SyntheticModel, tokens: int, dtype: str, device: str, seed: int) -> None:
        """Load or make the model, and run it once.

        Args:
            model: name or folder of a model, or the shape of one with random weights.
            tokens: the most tokens that will be in a cache before the flush that ends a round.
            dtype: name of the floating type of weights and states.
            device: torch device.
            seed: of weights and states.

        Raises:
            OptionValueError: the model has fewer positions.
            UnsupportedError: it has layers whose state is not one of keys and values.
            ModelLoadError: it cannot be loaded.
        """
        self._seed, self.device = seed, torch.device(device)
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
        self._token = torch.ones((1, 1), dtype=torch.int64, device=self.device)
        self._shapes = self._state_shapes()

    def describe(self) -> dict[str, Any]:
        """Return what matters of the model, as plain builtins."""
        config = self.model.config.get_text_config(decoder=True)
        (kv_heads, head_dim), _ = self._shapes[0]
        return {
            "name": self._name,
            "architecture": type(self.model).__name__,
            "layers": len(self._shapes),
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": config._attn_implementation,
        }

    def _state_shapes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Return ``(kv_heads, head_dim)`` of keys and of values for each layer, as a short run through it shows."""
        cache = DynamicCache(config=self.model.config)
        with torch.no_grad():
            self.model(input_ids=self._token.expand(1, 2), past_key_values=cache, use_cache=True)
        shapes = []
        for index, layer in enumerate(cache.layers):
            pair = [getattr(layer, name, None) for name in ("keys", "values")]
            if not all(isinstance(states, Tensor) and states.dim() == 4 for states in pair):
                reason = f"layer {index} is a {type(layer).__name__}, which takes no synthetic states"
                raise UnsupportedError("this model", [reason], "bench")
            keys, values = ((states.shape[1], states.shape[3]) for states in pair if states is not None)
            shapes.append((keys, values))
        return shapes

    def history(self, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Return random states ``[1, kv_heads, tokens, head_dim]`` for each layer; layers of one shape share them."""
        generator = torch.Generator(self.device).manual_seed(self._seed)

        def states(shape: tuple[int, int]) -> Tensor:
            size = (1, shape[0], tokens, shape[1])
            return torch.randn(size, generator=generator, device=self.device, dtype=self.model.dtype)

        made = {pair: (states(pair[0]), states(pair[1])) for pair in dict.fromkeys(self._shapes)}
        return [made[pair] for pair in self._shapes]

    def run(self, cache: Cache, history: Sequence[tuple[Tensor, Tensor]], steps: int) -> Round:
        """Fill an empty cache with states, then decode `steps` tokens, and one more with a flush where there is one."""
        with torch.no_grad():
            fill = seconds(lambda: self._append(cache, history), self.device)
            held = cache_bytes(cache)
            self._decode(cache)  # the first step after a fill finds cold memory and makes room: not a typical one
            times = [seconds(lambda: self._decode(cache), self.device) for _ in range(steps)]
            flush = None
            coming = next_flush(cache)
            if coming is not None:
                self._append(cache, _taken(history, coming.tokens_left - 1))
                flush = seconds(lambda: self._decode(cache), self.device)
        period = None if coming is None else coming.period
        return Round(fill, held, times, flush, period, int(cache.get_seq_length()))

    def _append(self, cache: Cache, states: Sequence[tuple[Tensor, Tensor]]) -> None:
        for layer, (keys, values) in enumerate(states):
            if keys.shape[2]:
                cache.update(keys, values, layer)

    def _decode(self, cache: Cache) -> None:
        self.model(input_ids=self._token, past_key_values=cache, use_cache=True)


def _taken(history: Sequence[tuple[Tensor, Tensor]], tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Return states of `tokens` tokens out of the history, again from its start where it is shorter."""
    index = torch.arange(tokens) % history[0][0].shape[2]
    return [(keys[:, :, index], values[:, :, index]) for keys, values in history]

"""The same text generated through the full-precision cache and through a quantised one, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvquant.cache.cache import QuantizedCache
from kvquant.cache.compat import given
from kvquant.engine.config import CacheConfig
from kvquant.errors import OptionValueError
from kvquant.evaluation.measure import held_bytes
from kvquant.evaluation.teacher import forced_logits

#: Called with the number of tokens done since the last call.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Run:
    """One greedy generation.

    Attributes:
        tokens: the tokens generated.
        cache_bytes: bytes of the cache afterwards.
        decode_seconds: median time from one token to the next.
        bits_per_element: of the quantised tokens; None for the full-precision cache, and while nothing is quantised.
        quantized_tokens: tokens in the body afterwards.
        cache_tokens: tokens in the cache afterwards.
    """

    tokens: tuple[int, ...]
    cache_bytes: int
    decode_seconds: float
    bits_per_element: float | None = None
    quantized_tokens: int = 0
    cache_tokens: int = 0


@dataclass(frozen=True)
class Comparison:
    """A quantised run beside the full-precision one.

    Attributes:
        config: the quantised cache's options.
        full: the run with `transformers.DynamicCache`.
        quantized: the run with `QuantizedCache`.
        forced: for each token of the full-precision text, whether the quantised cache would have chosen it too, given
            the same tokens before it.
    """

    config: CacheConfig
    full: Run
    quantized: Run
    forced: tuple[bool, ...]

    @property
    def same_start(self) -> int:
        """Tokens before the two texts part."""
        pairs = zip(self.full.tokens, self.quantized.tokens, strict=False)
        return next((at for at, (one, other) in enumerate(pairs) if one != other), min(map(len, self.texts)))

    @property
    def texts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Both texts, as tokens."""
        return self.full.tokens, self.quantized.tokens

    @property
    def agreement(self) -> float:
        """Share of next tokens on which the quantised cache agrees, given the same text before them."""
        return sum(self.forced) / max(1, len(self.forced))

    @property
    def byte_ratio(self) -> float:
        """Bytes of the full-precision cache over those of the quantised one."""
        return self.full.cache_bytes / max(1, self.quantized.cache_bytes)

    @property
    def time_ratio(self) -> float:
        """Time per token with the quantised cache over that with the full-precision one."""
        return self.quantized.decode_seconds / self.full.decode_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins, derived figures included."""
        return {
            "config": self.config.to_dict(),
            "full": asdict(self.full),
            "quantized": asdict(self.quantized),
            "forced": list(self.forced),
            "same_start": self.same_start,
            "agreement": self.agreement,
            "byte_ratio": self.byte_ratio,
            "time_ratio": self.time_ratio,
        }


class _Clock(BaseStreamer):  # type: ignore[misc]  # transformers ships no types for it
    """Notes when each token came."""

    def __init__(self, progress: Progress) -> None:
        self.times: list[float] = []
        self._progress = progress
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:  # noqa: ARG002  # the streamer interface
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            self._progress(1)
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to do."""

    def median_step(self) -> float:
        """Seconds from one token to the next; the first token is the prefill's and does not count."""
        steps = torch.tensor([later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False)])
        return float(steps.median()) if len(steps) else float("nan")


def compare(
    model: PreTrainedModel,
    prompt: Tensor,
    configs: Sequence[CacheConfig],
    *,
    max_new_tokens: int,
    progress: Progress = lambda _: None,
) -> list[Comparison]:
    """Generate greedily with the full-precision cache and with a quantised one for each config.

    Args:
        model: the model.
        prompt: int64 ``[1, tokens]``.
        configs: options of the quantised caches.
        max_new_tokens: tokens to generate, fewer where the model ends the text.
        progress: called as tokens are done, `total_steps` in all at most.

    Raises:
        OptionValueError: the prompt and what is to be generated do not fit into the model's context.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and prompt.shape[1] + max_new_tokens > limit:
        room = limit - prompt.shape[1]
        fits = f"at most {room}" if room > 0 else f"a prompt of fewer than {limit} tokens"
        raise OptionValueError(
            "max_new_tokens", max_new_tokens, f"{fits}: the prompt has {prompt.shape[1]} tokens and the context {limit}"
        )
    caches = [QuantizedCache.from_config(config, model.config) for config in configs]  # refuse before the long work
    _generate(model, prompt, DynamicCache(config=model.config), min(3, max_new_tokens), lambda _: None)  # warm up
    full = _generate(model, prompt, DynamicCache(config=model.config), max_new_tokens, progress)
    comparisons = []
    for config, cache in zip(configs, caches, strict=True):
        quantized = _generate(model, prompt, cache, max_new_tokens, progress)
        forced = _forced(model, prompt, full.tokens, QuantizedCache.from_config(config, model.config), progress)
        comparisons.append(Comparison(config, full, quantized, forced))
    return comparisons


def total_steps(configs: int, max_new_tokens: int) -> int:
    """Return how many tokens `compare` will report at most."""
    return (1 + 2 * configs) * max_new_tokens


def _generate(model: PreTrainedModel, prompt: Tensor, cache: Cache, max_new_tokens: int, progress: Progress) -> Run:
    clock = _Clock(progress)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **given(model, cache),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=model.generation_config.pad_token_id,
        ),
        streamer=clock,
    )
    tokens = tuple(out[0, prompt.shape[1] :].tolist())
    length = int(cache.get_seq_length())
    if not isinstance(cache, QuantizedCache):
        return Run(tokens, held_bytes(cache), clock.median_step(), cache_tokens=length)
    report = cache.memory_report()
    quantized = max(layer.quantized_tokens for layer in report.layers)
    return Run(tokens, report.nbytes, clock.median_step(), report.bits_per_element, quantized, length)


def _forced(
    model: PreTrainedModel, prompt: Tensor, text: Sequence[int], cache: Cache, progress: Progress
) -> tuple[bool, ...]:
    """Say for each token of `text` whether it is the likeliest one through `cache`, given the text before it."""
    fed = torch.tensor([text[:-1]], dtype=prompt.dtype, device=prompt.device)
    agreed: list[bool] = []
    for logits in forced_logits(model, cache, torch.cat([prompt, fed], dim=1), prompt.shape[1]):
        likeliest = logits.argmax(-1).tolist()
        agreed += [best == token for best, token in zip(likeliest, text[len(agreed) :], strict=False)]
        progress(len(likeliest))
    return tuple(agreed)

"""Whether a model works with a quantised cache: run beside transformers' own, before and after tokens are quantised."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from kvquant.attention.counters import counters
from kvquant.attention.kernels import TORCH, VARIABLE
from kvquant.cache.cache import QuantizedCache
from kvquant.cache.compat import given
from kvquant.cache.encoder_decoder import QuantizedEncoderDecoderCache
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.errors import ConfigError, KVQuantError
from kvquant.evaluation.advice import without_advice
from kvquant.evaluation.support import prompts
from kvquant.evaluation.support.families import Family
from kvquant.registry import get_backend
from kvquant.registry.guard import describe

#: Tokens that are generated; more where there are no others in the decoder, so that some of them are quantised.
NEW_TOKENS, WITHOUT_PROMPT = 6, 20

#: How far logits may be from those of full precision while nothing is quantised: rounding alone.
ROUNDING = 1e-4

#: How far they may be at 8 bits; with each bit less a step of codes is twice as wide.
AT_8_BITS = 0.04

#: All tokens are in the sink: nothing is quantised, whatever the layer.
_EXACT = {"sink_length": 1 << 16, "residual_length": 0}

#: What transformers' own layers are in words.
_KINDS = {
    "DynamicLayer": "full precision",
    "DynamicSlidingWindowLayer": "sliding window",
    "DynamicIndexedLayer": "indexed",
    "LinearAttentionLayer": "linear",
    "LinearAttentionAndFullAttentionLayer": "hybrid",
    "LinearAttentionAndSlidingWindowAttentionLayer": "hybrid with sliding window",
    "DummyLayer": "without states of their own",
}
QUANTISED, QUANTISED_WINDOW = "quantised", "quantised sliding window"

OK, REFUSED, ABSENT, FAILED = "ok", "refused", "absent", "failed"


@dataclass(frozen=True)
class Checked:
    """What came of running one model.

    Attributes:
        name: the family's, or the model's.
        model: name of its class.
        status: `OK`, `REFUSED` at construction, `ABSENT` from the installed transformers, or `FAILED`.
        reason: why it was refused, is absent or failed.
        note: what else there is to say.
        attention: transformers' name of its attention.
        layers: kind -> how many of the decoder's layers are of it.
        cross: the same for the layers of the encoder's states, empty where there is no encoder.
        equal: whether tokens are those of a `DynamicCache` while nothing is quantised.
        difference: how far logits are from those then, at most, relative to their spread.
        tokens, quantised: tokens of the decoder when something was, and those quantised, in the layer that has most.
        cross_tokens, cross_quantised: the same for the encoder's states.
        deviation: how far logits are then, at most, as long as the tokens are the same.
        fused, dequantised: how often one layer's attention read packed tokens, and how often a layer's keys or values
            were dequantised whole, in all steps after the prompt.
    """

    name: str
    model: str
    status: str = OK
    reason: str = ""
    note: str = ""
    attention: str = ""
    layers: Mapping[str, int] = field(default_factory=dict)
    cross: Mapping[str, int] = field(default_factory=dict)
    equal: bool | None = None
    difference: float | None = None
    tokens: int = 0
    quantised: int = 0
    cross_tokens: int = 0
    cross_quantised: int = 0
    deviation: float | None = None
    fused: int = 0
    dequantised: int = 0

    @property
    def steps(self) -> str:
        """How attention reads quantised tokens in steps after the prompt, in a word."""
        if not self.fused and not self.dequantised:
            return ""
        return "fused" if not self.dequantised else "both" if self.fused else "dequantised"

    def problems(self, nbits: float) -> list[str]:
        """Return what is wrong, in words; nothing where the model is refused or absent for a reason.

        Args:
            nbits: bits that it was run with.
        """
        if self.status != OK:
            return [self.reason] if self.status == FAILED else []
        found = []
        if not self.equal:
            found.append("tokens are not those of DynamicCache while nothing is quantised")
        if not (self.difference or 0) <= ROUNDING:
            found.append(f"logits are {self.difference:.1e} off while nothing is quantised")
        if not (self.deviation or 0) <= allowed(nbits):
            found.append(f"logits are {self.deviation:.2f} off at {nbits} bits, and {allowed(nbits):.2f} is allowed")
        quantisable = sum(count for kind, count in self.layers.items() if kind in (QUANTISED, QUANTISED_WINDOW))
        if quantisable and not self.quantised + self.cross_quantised:
            found.append("nothing was quantised")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins."""
        return {**dataclasses.asdict(self), "steps": self.steps or None}


def allowed(nbits: float) -> float:
    """Return how far logits may be off at `nbits` bits, relative to their spread."""
    return float(AT_8_BITS * 2 ** (8 - nbits))


# ------------------------------------------------------------------------------------------------ families


def check_family(family: Family, backend: str, nbits: float) -> Checked:
    """Run the model of a family.

    Raises:
        ConfigError, BackendError: the backend cannot do it, whatever the model.
    """
    told = Checked(family.name, family.model, note=family.note)
    kind = getattr(transformers, family.model, None)
    if kind is None:
        reason = f"transformers {transformers.__version__} has no {family.model}"
        return dataclasses.replace(told, status=ABSENT, reason=reason)
    try:
        with without_advice():
            model = make(kind, family.options)
    except Exception as cause:  # noqa: BLE001  # whatever a version's config class says to these options
        return dataclasses.replace(told, status=FAILED, reason=f"its model cannot be made: {describe(cause)}")
    return check_model(told, model, prompts.of_family(family), small_options(backend, nbits))


def make(kind: type[PreTrainedModel], options: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model with random weights that are large enough for attention to choose, the same each time."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = kind(kind.config_class(**options)).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
        for module in model.modules():
            norm = getattr(getattr(module, "q_norm", None), "weight", None)
            if norm is not None and getattr(module, "scaling", None) == 1:
                norm.fill_(norm.shape[0] ** -0.5)  # such models learn here what others scale scores by
    return model


def small_options(backend: str, nbits: float) -> dict[str, Any]:
    """Return options with which prompts of `PROMPT_TOKENS` tokens are quantised: the backend's smallest groups from 8.

    Raises:
        UnknownBackendError: there is no such backend.
    """
    sizes = [size for size in get_backend(backend).capabilities.group_sizes or () if size >= 8]
    group = min(sizes, default=8)
    return {"backend": backend, "nbits": nbits, "group_size": group, "residual_length": 8}


# ------------------------------------------------------------------------------------------------ any model


def check_model(told: Checked, model: PreTrainedModel, inputs: Mapping[str, Any], options: dict[str, Any]) -> Checked:
    """Run a model with transformers' own cache, with ours while nothing is quantised, and with some tokens quantised.

    Args:
        told: what is known of it already.
        model: the model.
        inputs: of its `generate`.
        options: of the cache with which some tokens are quantised.

    Raises:
        ConfigError, BackendError: the options cannot work, whatever the model.
    """
    CacheConfig.from_dict(options)
    QuantizedCache(**options)
    told = dataclasses.replace(told, attention=str(model.config.get_text_config(decoder=True)._attn_implementation))
    try:
        exact, packed = new_cache(model, {**options, **_EXACT}), new_cache(model, options)
    except ConfigError as refusal:
        return dataclasses.replace(told, status=REFUSED, reason=str(refusal))
    try:
        with without_advice():
            theirs = _generated(model, inputs, None)
            before = _generated(model, inputs, exact)
            after = _generated(model, inputs, packed)
    except KVQuantError as failure:
        return dataclasses.replace(told, status=FAILED, reason=str(failure))
    except Exception as failure:  # noqa: BLE001  # any model's own, which is what we want to know
        return dataclasses.replace(told, status=FAILED, reason=describe(failure))
    own, cross = _parts(packed)
    (tokens, quantised), (cross_tokens, cross_quantised) = _held(own), _held(cross)
    return dataclasses.replace(
        told,
        layers=_kinds(own.layers),
        cross=_kinds(cross.layers) if cross else {},
        equal=torch.equal(before.tokens, theirs.tokens),
        difference=_distance(before, theirs),
        tokens=tokens,
        quantised=quantised,
        cross_tokens=cross_tokens,
        cross_quantised=cross_quantised,
        deviation=_distance(after, theirs),
        fused=after.fused,
        dequantised=after.dequantised,
    )


def new_cache(model: PreTrainedModel, options: Mapping[str, Any]) -> QuantizedCache | QuantizedEncoderDecoderCache:
    """Return an empty quantised cache of the class that a model needs."""
    kind = QuantizedEncoderDecoderCache if model.config.is_encoder_decoder else QuantizedCache
    return kind(config=model.config, **options)


@contextlib.contextmanager
def for_tiny_models() -> Iterator[None]:
    """Have torch attend unless the environment asks for a kernel, in one thread.

    A kernel is compiled for every shape of heads, which takes longer than all families, and whether attention is fused
    does not depend on it. Threads wait longer for each other than these models take.
    """
    asked, threads = os.environ.get(VARIABLE), torch.get_num_threads()
    os.environ[VARIABLE] = asked or TORCH
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if asked is None:
            del os.environ[VARIABLE]


@dataclass(frozen=True)
class _Run:
    tokens: Tensor
    logits: tuple[Tensor, ...]
    fused: int
    dequantised: int


def _generated(model: PreTrainedModel, inputs: Mapping[str, Any], cache: Any) -> _Run:
    """Generate greedily, and count what attention does in steps after the prompt."""
    # Models may look at a cache when they are done, too: what counts is what happens within a step.
    counts, steps, begun = Counter[str](), 0, Counter[str]()

    def begin(*_: Any) -> None:
        begun.update(fused=counters.fused, dequantised=counters.materialised)

    def end(*_: Any) -> None:
        nonlocal steps
        if steps:
            counts.update(fused=counters.fused, dequantised=counters.materialised)
            counts.subtract(begun)
        begun.clear()
        steps += 1

    length = WITHOUT_PROMPT if model.config.is_encoder_decoder else NEW_TOKENS
    hooks = model.register_forward_pre_hook(begin), model.register_forward_hook(end)
    try:
        out = model.generate(
            **inputs,
            **({} if cache is None else given(model, cache)),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return _Run(out.sequences, out.logits, counts["fused"], counts["dequantised"])


def _parts(cache: QuantizedCache | QuantizedEncoderDecoderCache) -> tuple[QuantizedCache, QuantizedCache | None]:
    if isinstance(cache, QuantizedEncoderDecoderCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return cache, None


def _kinds(layers: list[Any]) -> dict[str, int]:
    return dict(Counter(_kind(layer) for layer in layers))


def _kind(layer: Any) -> str:
    if isinstance(layer, QuantizedLayer):
        return QUANTISED_WINDOW if layer.is_sliding else QUANTISED
    return _KINDS.get(type(layer).__name__, type(layer).__name__)


def _held(cache: QuantizedCache | None) -> tuple[int, int]:
    """Return the tokens held and quantised, in the layer that has most."""
    layers = cache.memory_report().layers if cache else ()
    tokens, quantised = ([getattr(layer, name) for layer in layers] for name in ("tokens", "quantized_tokens"))
    return max(tokens, default=0), max(quantised, default=0)


def _distance(run: _Run, other: _Run) -> float:
    """Return how far logits are from those of another run, at most, relative to the spread of those over tokens.

    Steps after the first in which the two took another token do not count: they have other things to say.
    """
    farthest = 0.0
    for mine, theirs in zip(run.logits, other.logits, strict=True):
        spread = (theirs - theirs.mean(dim=-1, keepdim=True)).norm()
        farthest = max(farthest, float((mine - theirs).norm() / spread))
        if not torch.equal(mine.argmax(dim=-1), theirs.argmax(dim=-1)):
            break
    return farthest

"""The outlier twin: the same model with keys that have outlier channels, as large models have them and small ones lack.

In the keys of large models a few channels are 10 to 100 times larger than the rest (KIVI, arXiv 2402.02750, section
3.1; KVQuant, arXiv 2401.18079, section 3.1), most of them among the slow frequencies of the rotary embedding (Jin et
al., "Massive values in self-attention modules are the key to contextual knowledge understanding", 2025). Attention
takes products of queries and keys alone, so a channel of the keys may be scaled by any factor if that of the queries is
scaled by its inverse. The two channels that a rotary embedding turns into one another share a factor. All factors are
powers of two: products of scaled numbers are the products of the numbers, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvquant.errors import OptionValueError, UnsupportedError

#: The smallest factor of an outlier channel.
SMALLEST = 16
#: Rotary pairs of every KV head that become outliers: 4 channels.
PAIRS = 2
#: Tokens on which the twin must say what the model says.
_PROBE = 16


@dataclass(frozen=True)
class Outliers:
    """The factors of the key channels of one attention layer.

    Attributes:
        layer: name of the module.
        factors: of each key channel, float32 ``[kv_heads, head_dim]``; 1 where nothing was changed.
    """

    layer: str
    factors: Tensor


@torch.no_grad()
def outlier_twin(model: PreTrainedModel, largest: int = 64, *, seed: int = 0) -> tuple[Outliers, ...]:
    """Give a model outlier channels in its keys, in place, without changing what it says in full precision.

    In every KV head `PAIRS` rotary pairs are drawn from the slower half of the frequencies, and for each a power of two
    from `SMALLEST` to `largest`: the weights that make these key channels are multiplied by it, those that make the
    matching channels of all query heads of the group are divided by it. Where a model normalises queries and keys,
    the weights of the norms are scaled, which all heads of a layer share.

    Args:
        model: a model whose attention has projections ``q_proj`` and ``k_proj`` and rotary pairs half a head apart
            (Llama, Mistral, Qwen and their kin).
        largest: the largest factor, a power of two.
        seed: of what is drawn.

    Returns:
        What was done to every attention layer.

    Raises:
        OptionValueError: `largest` is not a power of two, or too small.
        UnsupportedError: the model is built in another way. It is as it was.
    """
    if largest < SMALLEST or largest & (largest - 1):
        raise OptionValueError("outliers", largest, f"a power of two from {SMALLEST} on")
    layers = [(name, module) for name, module in model.named_modules() if _is_attention(module)]
    if not layers:
        raise UnsupportedError(
            "the outlier twin", ["the model's attention has no q_proj and k_proj with plain weights"]
        )
    draw = torch.Generator().manual_seed(seed)
    done = []
    before = _probe(model)
    for name, module in layers:
        factors = _factors(module, largest, draw)
        _scale(module, factors)
        done.append(Outliers(name, factors))
    if not torch.equal(before, after := _probe(model)):
        worst = (before - after).abs().max().item()
        for (_, module), outliers in zip(layers, done, strict=True):
            _scale(module, 1 / outliers.factors)
        reason = f"scaled keys and queries change what the model says (by {worst:.3g}); its rotary pairs lie otherwise"
        raise UnsupportedError("the outlier twin", [reason])
    return tuple(done)


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "head_dim") and all(_is_plain(getattr(module, name, None)) for name in ("q_proj", "k_proj"))


def _is_plain(projection: Any) -> bool:
    """Whether it is a linear map with its weights as they are: those of a quantised model are packed."""
    return isinstance(projection, nn.Linear) and projection.weight.shape == (
        projection.out_features,
        projection.in_features,
    )


def _norms(module: Any) -> tuple[Tensor, Tensor] | None:
    query, key = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
    return None if query is None or key is None else (query.weight, key.weight)


def _factors(module: Any, largest: int, draw: torch.Generator) -> Tensor:
    head_dim = int(module.head_dim)
    heads = module.k_proj.out_features // head_dim
    half = head_dim // 2
    powers = (largest // SMALLEST).bit_length()
    factors = torch.ones(heads, head_dim)
    for head in range(heads):
        pairs = half // 2 + torch.randperm(half - half // 2, generator=draw)[:PAIRS]
        chosen = SMALLEST * 2.0 ** torch.randint(powers, (len(pairs),), generator=draw)
        factors[head, pairs] = factors[head, pairs + half] = chosen
    return factors[:1].expand(heads, -1).clone() if _norms(module) else factors


def _scale(module: Any, factors: Tensor) -> None:
    """Multiply key channels by `factors` ``[kv_heads, head_dim]``, and divide query channels."""
    if norms := _norms(module):
        query, key = norms
        key.mul_(_fit(factors, key))
        query.div_(_fit(factors, query))
        return
    group = module.q_proj.out_features // module.k_proj.out_features
    for projection, each in ((module.k_proj, factors), (module.q_proj, 1 / factors.repeat_interleave(group, dim=0))):
        rows = each.flatten().to(projection.weight)
        projection.weight.mul_(rows[:, None])
        if projection.bias is not None:
            projection.bias.mul_(rows)


def _fit(factors: Tensor, weight: Tensor) -> Tensor:
    """Return the factors as a norm's weight has them: of one head, or of all heads side by side."""
    each = factors[0] if weight.numel() == factors.shape[1] else factors[0].repeat(weight.numel() // factors.shape[1])
    return each.to(weight)


def _probe(model: PreTrainedModel) -> Tensor:
    tokens = torch.arange(_PROBE, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits

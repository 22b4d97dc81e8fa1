"""The attention ``"kvquant"``, for models whose attention torch's `scaled_dot_product_attention` cannot express.

`attn_implementation="sdpa"` is all that most models need. To those that soft-cap their scores (Gemma 2) or learn
attention sinks (gpt-oss) transformers offers ``eager``, which writes all scores to memory and dequantises the whole
cache. With ``"kvquant"`` they attend like the others, over packed tokens and, where they are exact, tile by tile.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvquant.attention.lazy import LazyStates
from kvquant.attention.tiles import Exact, attend
from kvquant.errors import UnsupportedError

#: What `attn_implementation` calls it.
NAME = "kvquant"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend, as transformers asks of an attention function.

    Args:
        module: the attention layer; `is_causal` is taken from it where that is None.
        query: ``[batch, query_heads, query_tokens, head_dim]``.
        key: ``[batch, kv_heads, tokens, head_dim]``, from a cache or from the model.
        value: likewise.
        attention_mask: broadcastable to ``[batch, query_heads, query_tokens, tokens]``; bool or additive.
        dropout: not supported together with `softcap` or `s_aux`.
        scaling: factor on the scores; None takes ``head_dim ** -0.5``.
        is_causal: whether query tokens see only what comes before them, where there is no mask.
        softcap: what scores are soft-capped at.
        s_aux: attention sinks ``[query_heads]``.
        **others: what `sdpa_attention_forward` takes, where there is neither `softcap` nor `s_aux`.

    Returns:
        ``[batch, query_tokens, query_heads, value_head_dim]``, and None in place of the weights.

    Raises:
        UnsupportedError: there is dropout, a bias by position or a paged cache together with `softcap` or `s_aux`.
    """
    if softcap is None and s_aux is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return out
    beside = {
        "dropout": dropout != 0,
        "a bias by position": others.get("position_bias") is not None,
        "continuous batching": others.get("cache") is not None,  # its paged cache is updated by the attention
    }
    reasons = [f"{name} cannot be combined with soft-capping or sinks" for name, there in beside.items() if there]
    if reasons:
        raise UnsupportedError(f"attn_implementation={NAME!r}", [*reasons, "attn_implementation='eager' can do that"])
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    options: dict[str, Any] = {
        # One query token sees all that there is, wherever it stands.
        "is_causal": causal and attention_mask is None and query.shape[2] > 1,
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
    }
    mixed = None
    if isinstance(key, LazyStates):
        mixed = key.attend(query, key, value, attention_mask, gqa=True, **options)
        attention_mask = key.hidden(attention_mask, is_causal=options["is_causal"])
    if mixed is None:
        mixed = attend(query, Exact(_numbers(key)), Exact(_numbers(value)), attention_mask, **options)
    return mixed.transpose(1, 2).contiguous(), None


def _numbers(states: Tensor) -> Tensor:
    return states.dequantize() if isinstance(states, LazyStates) else states


def register() -> None:
    """Make the attention known to transformers, with the masks of ``sdpa``. Doing so again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def unregister() -> None:
    """Leave transformers as if the attention had never been registered."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)

"""Queries, keys and values of every layer of a model, as attention gets them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from kvquant.attention.tiles import Exact, attend
from kvquant.cache.compat import given
from kvquant.errors import UnsupportedError

#: What the attention that records is called while it does.
_NAME = "kvquant-recording"


@dataclass(frozen=True)
class Recorded:
    """What one layer's attention got.

    Attributes:
        query: ``[1, query_heads, queries, head_dim]``, of the last tokens.
        keys, values: ``[1, kv_heads, tokens, head_dim]``, of all.
        options: ``scale``, ``softcap`` and ``sinks``, see `tiles.attend`.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    options: dict[str, Any]


@torch.no_grad()
def record(model: PreTrainedModel, cache: Cache, tokens: Tensor, queries: int) -> dict[int, Recorded]:
    """Run a text through a model in one pass, and return what the attention of each layer got.

    Args:
        model: its attention is its own again afterwards.
        cache: an empty full-precision cache.
        tokens: int64 ``[1, tokens]``.
        queries: tokens at the end whose queries are kept.

    Returns:
        Layer -> what it got, for the layers that have a cache of their own: where layers share the states of others,
        there is nothing of theirs to quantise.

    Raises:
        UnsupportedError: attention of this model cannot be recorded.
    """
    found: dict[int, Recorded] = {}
    with _attention(model, functools.partial(_record, found, queries)):
        model(input_ids=tokens, use_cache=True, **given(model, cache))
    own = {index for index, layer in enumerate(cache.layers) if isinstance(getattr(layer, "keys", None), Tensor)}
    layers = {index: layer for index, layer in found.items() if index in own and layer.keys.shape[2] == tokens.shape[1]}
    if not layers:
        reason = "its attention is not made by one of transformers' attention functions, which is where they are seen"
        raise UnsupportedError(f"recording the states of {type(model).__name__}", [reason])
    return layers


def _record(
    found: dict[int, Recorded],
    queries: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend, as transformers asks of an attention function, and keep what came."""
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    layer = getattr(module, "layer_idx", None)
    if layer is not None:
        found[layer] = Recorded(query[:, :, -queries:].clone(), key, value, options)
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    mixed = attend(
        query, Exact(key), Exact(value), attention_mask, is_causal=causal and attention_mask is None, **options
    )
    return mixed.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def _attention(model: PreTrainedModel, function: Callable[..., Any]) -> Iterator[None]:
    """Have a model attend by a function, with the masks of ``sdpa``, while the block runs."""
    before = model.config.get_text_config(decoder=True)._attn_implementation
    AttentionInterface.register(_NAME, function)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(_NAME, None)

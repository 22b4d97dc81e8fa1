"""Which attention runs: over the packed stores where it can, over dequantised states where it must."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvquant.attention import tiles
from kvquant.attention.counters import counters

if TYPE_CHECKING:
    from kvquant.attention.states import QuantizedStates


def attend(
    query: Tensor,
    key: QuantizedStates,
    value: QuantizedStates,
    mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Attend over the packed stores behind `key` and `value`; see `tiles.attend`."""
    counters.fused += 1
    return tiles.attend(query, key.store, value.store, mask, is_causal=is_causal, scale=scale)


def can_attend(
    query: Tensor, key: QuantizedStates, value: QuantizedStates, mask: Tensor | None, dropout: float, *, gqa: bool
) -> bool:
    """Whether `attend` does what `torch.nn.functional.scaled_dot_product_attention` would do for these arguments."""
    if dropout or query.dim() != 4 or (torch.is_grad_enabled() and query.requires_grad):
        return False
    if key.unfolded or value.unfolded or len(key.store) != len(value.store):
        return False
    heads_fit = query.shape[1] == key.shape[1] == value.shape[1] or (
        gqa and key.shape[1] == value.shape[1] and query.shape[1] % key.shape[1] == 0
    )
    mask_fits = mask is None or (
        mask.dim() <= 4
        and not mask.requires_grad
        and mask.shape[-1] in (1, key.shape[2])
        and (mask.dim() < 3 or mask.shape[-3] in (1, query.shape[1]))
    )
    return (
        heads_fit
        and mask_fits
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[3] == key.shape[3]
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
    )

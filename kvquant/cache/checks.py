"""What states must be like to come into a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from kvquant.engine.store import Store
from kvquant.errors import NonFiniteStatesError, StatesError


def check_pair(key_states: Tensor, value_states: Tensor, where: str) -> None:
    """Refuse keys and values that are no states, or do not belong together.

    Raises:
        StatesError: saying what they should be; `where` is the layer's name in it.
    """
    for stream, states in (("key", key_states), ("value", value_states)):
        if states.dim() != 4:
            raise StatesError(
                f"{stream} states need 4 dimensions [batch, kv_heads, tokens, head_dim], got {list(states.shape)}",
                where,
            )
        _check_floating(stream, states, where)
    shapes = f"{list(key_states.shape)} and {list(value_states.shape)}"
    if key_states.shape[:3] != value_states.shape[:3]:
        raise StatesError(f"key and value states must agree in batch, heads and tokens, got {shapes}", where)
    # Their dtypes may differ: under autocast keys come in float32 and values in bfloat16.
    if key_states.device != value_states.device:
        raise StatesError(
            f"key and value states must be on one device, got {key_states.device} and {value_states.device}", where
        )


def check_same(stream: str, states: Tensor, store: Store, where: str) -> None:
    """Refuse states that are not like those that a store holds.

    Raises:
        StatesError: saying what has changed.
    """
    if states.device != store.device and states.device.type == "meta":
        reason = f"the {stream} states are on {states.device}, which holds no numbers; the cache is on {store.device}"
        raise StatesError(reason, where)
    for what, got, held in (
        ("batch size", states.shape[0], store.batch),
        ("number of heads", states.shape[1], store.kv_heads),
        ("head_dim", states.shape[3], store.head_dim),
        ("dtype", states.dtype, store.dtype),
    ):
        if got != held:
            raise StatesError(
                f"the {what} of the {stream} states changed from {held} to {got}; the cache holds {len(store)} "
                "tokens, reset() empties it",
                where,
            )


def check_finite(stream: str, states: Tensor, first_token: int, where: str) -> None:
    """Refuse NaN and infinity in states whose first token stands at `first_token`.

    Raises:
        NonFiniteStatesError: saying which tokens.
    """
    if not states.numel():
        return
    # One pass without a temporary, in the order of memory; NaN makes both bounds NaN.
    by_stride = sorted(range(4), key=states.stride, reverse=True)
    low, high = torch.aminmax(states.detach().permute(by_stride))
    if not bool(low.isfinite() & high.isfinite()):
        bad = (~states.isfinite()).any(dim=3).any(dim=1).any(dim=0).nonzero().flatten().tolist()
        raise NonFiniteStatesError(stream, first_token + bad[0], first_token + bad[-1] + 1, where)


def check_assigned(stream: str, states: object, where: str) -> None:
    """Refuse what cannot be assigned in place of a layer's states.

    Raises:
        StatesError: saying what could.
    """
    if not isinstance(states, Tensor) or states.dim() != 4:
        shown = list(states.shape) if isinstance(states, Tensor) else repr(states)
        raise StatesError(
            f"only a tensor [batch, kv_heads, tokens, head_dim] can be assigned as {stream} states, got {shown}", where
        )
    _check_floating(stream, states, where)


def _check_floating(stream: str, states: Tensor, where: str) -> None:
    if not states.is_floating_point():
        raise StatesError(f"{stream} states need a floating type, got {states.dtype}", where)


def same_kind(states: Tensor, store: Store) -> bool:
    """Whether `states` can take the place of what `store` holds, token for token."""
    held = (store.batch, store.kv_heads, len(store), store.head_dim)
    return tuple(states.shape) == held and states.dtype == store.dtype and states.device == store.device

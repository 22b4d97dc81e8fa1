"""`QuantizedStates`: what a quantised layer hands to a model in place of its keys or values.

It has the shape, dtype and device of the states, and a reference to their store instead of the numbers.
`torch.nn.functional.scaled_dot_product_attention` reads the store directly; every other operation dequantises first
and is right. So a model needs no change: with transformers' `sdpa` attention decoding is fused, with any other it is
merely correct.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvquant.attention import dispatch
from kvquant.attention.counters import counters
from kvquant.attention.lazy import LazyStates, can_attend, dense
from kvquant.engine.store import Store
from kvquant.errors import StaleStatesError


class QuantizedStates(LazyStates):
    """States ``[batch, kv_heads * repeats, tokens, head_dim]`` that stand for a store.

    They are read only, and stand for the store as it was when they were made: once it has changed they refuse to be
    read, because it keeps no history.

    Attributes:
        store: the store behind them.
        stream, repeats, unfolded: as in `LazyStates`.
    """

    store: Store
    _version_made: int

    @staticmethod
    def __new__(cls, store: Store, stream: str, repeats: int = 1, unfolded: bool = False) -> QuantizedStates:
        """Make states that stand for `store` as it is now."""
        heads = (store.kv_heads, repeats) if unfolded else (store.kv_heads * repeats,)
        states = Tensor._make_wrapper_subclass(
            cls, (store.batch, *heads, len(store), store.head_dim), dtype=store.dtype, device=store.device
        )
        states.store, states.stream, states.repeats, states.unfolded = store, stream, repeats, unfolded
        states._version_made = store.version
        return states

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        """Everything happens in `__new__`, as torch asks of wrapper subclasses."""

    # -------------------------------------------------------------------------------------------- reading

    @property
    def is_stale(self) -> bool:
        """Whether the store has changed since these states were made."""
        return self.store.version != self._version_made

    def dequantize(self) -> Tensor:
        """Return the numbers as a plain tensor.

        Raises:
            StaleStatesError: the store has changed since these states were made.
        """
        self._check_fresh()
        counters.materialised += 1
        return self._repeated(self.store.read())

    def _check_fresh(self) -> None:
        if self.is_stale:
            raise StaleStatesError(self.stream)

    def _again(self, repeats: int, *, unfolded: bool) -> Tensor:
        self._check_fresh()
        return QuantizedStates(self.store, self.stream, repeats, unfolded)

    def _tokens(self, index: tuple[Any, ...]) -> Tensor:
        """Return ``self[index]``, where ``index[2]`` is a slice of tokens, reading those tokens only."""
        self._check_fresh()
        start, stop, _ = index[2].indices(self.shape[2])
        part = self._repeated(self.store.read(start, max(start, stop)))
        return part[(*index[:2], slice(None), *index[3:])]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch's stub names a parameter of no use here
        if self.is_stale:
            state = "out of date"
        else:
            encoder = self.store.body.encoder
            state = (
                f"{len(self.store.body)} of {len(self.store)} tokens in {encoder.nbits} bits by "
                f"{encoder.backend}; .dequantize() gives the numbers"
            )
        return f"QuantizedStates({self.stream}, shape={list(self.shape)}, dtype={self.dtype}, {state})"

    # -------------------------------------------------------------------------------------------- torch's hooks

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub leaves out func and the defaults
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Serve code that calls operators below the Python interface."""
        return func(*dense(args), **dense(kwargs or {}))

    @classmethod
    def attend(cls, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor | None:
        """Attend over the stores, see `attend_packed`."""
        return attend_packed(query, key, value, mask, **options)


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, gqa: bool, **options: Any
) -> Tensor | None:
    """Attend over the stores behind quantised states, or return None where that is not what torch would do.

    Args:
        query, key, value, mask: as for `torch.nn.functional.scaled_dot_product_attention`.
        gqa: whether query heads may share key/value heads.
        options: of `tiles.attend`.

    Raises:
        StaleStatesError: the store has changed since the states were made.
    """
    if not (isinstance(key, QuantizedStates) and isinstance(value, QuantizedStates) and type(query) is Tensor):
        return None
    key._check_fresh()
    value._check_fresh()
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if not can_attend(query, key, value, mask, gqa=gqa, cast=dtype is not None):
        return None
    with torch.autocast(kind, enabled=False):
        out = dispatch.attend(query, key.store, value.store, mask, **options)
    return out if dtype is None else out.to(dtype)

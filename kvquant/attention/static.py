"""`StaticStates`: what a layer of fixed size hands to a model in place of its keys or values.

They have the shape of a cache that is full, ``[batch, kv_heads, max_cache_len, head_dim]``, at every step, and of the
numbers none: one element that is repeated. What a model does with them ends in an operator of
`kvquant.attention.operators`, in eager code as in a graph of `torch.compile`, which traces this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvquant.attention import operators
from kvquant.attention.lazy import LazyStates, can_attend
from kvquant.errors import StaleStatesError


class StaticStates(LazyStates):
    """States ``[batch, kv_heads * repeats, tokens, head_dim]`` that stand for the tokens of a layer.

    Tokens that are not there yet are zeros. Attention does not see them, nor those behind the last of a slice.

    Attributes:
        states: ``[batch, kv_heads, new_tokens, head_dim]``, those of the last update.
        handle, count: what names the layer to operators, and the tokens it holds by their count.
        length: the tokens it holds, for all others.
        room: tokens that all its states stand for.
        version: of the layer when they were made, None in a graph, which makes them anew at every step.
        stream, repeats, unfolded: as in `LazyStates`.
    """

    states: Tensor
    handle: Tensor
    count: Tensor
    length: Tensor
    room: int
    version: int | None

    # -------------------------------------------------------------------------------------------- reading

    def dequantize(self) -> Tensor:
        """Return the numbers as a plain tensor, zeros where there are no tokens yet.

        Raises:
            StaleStatesError: the layer has changed since these states were made.
            OutOfStepError: a graph counts other tokens than it holds.
        """
        self.check_fresh()
        states, tokens = self.states.detach(), self.shape[-2]
        where = self.handle, self.count, self.stream == "value"
        wants_gradient = torch.is_grad_enabled() and self.states.requires_grad
        if wants_gradient and not torch.compiler.is_compiling():
            # Gradients reach the states of the last update, and change no number.
            numbers, new = operators.read(states, *where, self.room), states.shape[2]
            numbers[:, :, : len(operators.layer(self.handle))][:, :, -new:] += self.states - states
            return self._repeated(numbers[:, :, :tokens])
        numbers = operators.read(states, *where, tokens)
        return self._repeated(operators.watch(numbers, [self.states]) if wants_gradient else numbers)

    def check_fresh(self) -> None:
        """Raise if the layer has changed since these states were made: it keeps no history."""
        if self.version is not None and self.version != operators.version(self.handle):
            raise StaleStatesError(self.stream)

    def _again(self, repeats: int, *, unfolded: bool) -> Tensor:
        self.check_fresh()
        return _made(self, self.shape[-2], repeats, unfolded=unfolded)

    def _tokens(self, index: tuple[Any, ...]) -> Tensor:
        """Return ``self[index]``, where ``index[2]`` is a slice of tokens; that of the first tokens stays lazy."""
        start, stop, _ = index[2].indices(self.shape[2])
        whole = [item == slice(None) for at, item in enumerate(index) if at != 2]
        if start == 0 and stop > 0 and all(whole):
            self.check_fresh()
            return _made(self, stop, self.repeats, unfolded=False)
        return self.dequantize()[index]

    def hidden(self, mask: Tensor | None, *, is_causal: bool) -> Tensor | None:
        """Return the mask that attention over the numbers of these keys needs: one that hides tokens not there yet.

        Args:
            mask: the one that it was given, None for none.
            is_causal: whether causality hides what comes after a query.
        """
        if mask is None and is_causal:
            return None
        there = (torch.arange(self.shape[-2], device=self.device) < self.length.to(self.device))[None, None, None]
        if mask is None:
            return there
        return mask & there if mask.dtype == torch.bool else mask.masked_fill(~there, -torch.inf)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch's stub names a parameter of no use here
        shape = f"shape={list(self.shape)}, dtype={self.dtype}"
        return f"StaticStates({self.stream}, {shape}, {int(self.length)} tokens; .dequantize() gives the numbers)"

    # -------------------------------------------------------------------------------------------- torch's hooks

    @classmethod
    def attend(cls, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor | None:
        """Attend over the tokens, see `attend_static`."""
        return attend_static(query, key, value, mask, **options)


def static_states(
    states: Tensor, stream: str, tokens: int, *, handle: Tensor, count: Tensor, length: Tensor, version: int | None
) -> StaticStates:
    """Return states that stand for `tokens` tokens; the other arguments are attributes of `StaticStates`."""
    batch, kv_heads, _, head_dim = states.shape
    made = states.detach().new_zeros(1).expand(batch, kv_heads, tokens, head_dim).as_subclass(StaticStates)
    made.states, made.handle, made.count, made.length = states, handle, count, length
    made.room, made.version = tokens, version
    made.stream, made.repeats, made.unfolded = stream, 1, False
    return made


def _made(like: StaticStates, tokens: int, repeats: int, *, unfolded: bool) -> StaticStates:
    """Return the same states with other tokens or repeats."""
    batch, kv_heads, _, head_dim = like.states.shape
    heads = (kv_heads, repeats) if unfolded else (kv_heads * repeats,)
    made = like.states.detach().new_zeros(1).expand(batch, *heads, tokens, head_dim).as_subclass(StaticStates)
    made.states, made.handle, made.count, made.length = like.states, like.handle, like.count, like.length
    made.room, made.version = like.room, like.version
    made.stream, made.repeats, made.unfolded = like.stream, repeats, unfolded
    return made


def attend_static(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    gqa: bool,
    is_causal: bool,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | None:
    """Attend over the tokens behind static states, or return None where that is not what torch would do.

    Args:
        query, key, value, mask: as for `torch.nn.functional.scaled_dot_product_attention`.
        gqa: whether query heads may share key/value heads.
        is_causal, scale, softcap, sinks: as for `tiles.attend`.

    Raises:
        StaleStatesError: the layer has changed since the states were made.
        OutOfStepError: a graph counts other tokens than it holds.
    """
    if not (isinstance(key, StaticStates) and isinstance(value, StaticStates) and type(query) is Tensor):
        return None
    key.check_fresh()
    value.check_fresh()
    given = (query, key.states, value.states, *(() if sinks is None else (sinks,)))
    sources = [one for one in given if torch.is_grad_enabled() and one.requires_grad]
    if sources and not torch.compiler.is_compiling():
        return None
    kind = query.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if not can_attend(query.detach(), key, value, mask, gqa=gqa, cast=cast is not None):
        return None
    out: Tensor = operators.attend(
        query.detach(),
        key.states.detach(),
        value.states.detach(),
        key.handle,
        key.count,
        mask,
        key.shape[2],
        key.repeats,
        gqa,
        is_causal,
        scale,
        softcap,
        None if sinks is None else sinks.detach(),
        cast,
    )
    return operators.watch(out, sources) if sources else out

"""A layer's work as operators of torch, which `torch.compile` takes into its graphs without looking inside.

    torch.ops.kvquant.append    quantises and stores what a step brings
    torch.ops.kvquant.attend    attends over packed tokens, with the kernel that there is for them
    torch.ops.kvquant.read      dequantises

What they do is plain Python that runs at every call, so every backend and every kernel can be compiled around. Each
has a fake implementation, which gives the shape of the result alone.

An operator gets a layer as a number in a tensor. A graph then does not depend on which layer, of which cache, it was
made with; were it a plain number, torch would compile anew for each. A count of the tokens held is a tensor for the
same reason. `append` writes to it, and the others are given it: by that the compiler knows what has to come before
what, and that a step that is left out, or done again, is not the same. Nothing but operators reads the count: inductor
computes what it takes from a tensor when it is needed, and may find there what an operator has written since.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, library
from torch.nn import functional

from kvquant.attention import dispatch
from kvquant.attention.counters import counters
from kvquant.attention.tiles import Exact
from kvquant.attention.tiles import attend as attend_exact
from kvquant.engine.store import Store
from kvquant.errors import GraphGradientError, OutOfStepError


class Held(Protocol):
    """What operators ask of a layer."""

    @property
    def where(self) -> str:
        """Its name in messages."""

    @property
    def stores(self) -> tuple[Store, Store]:
        """The stores of keys and values."""

    def __len__(self) -> int:
        """Return the tokens held."""

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Append states ``[batch, kv_heads, tokens, head_dim]``, or raise and change nothing."""

    def use(self) -> None:
        """Say that it is about to be read."""


_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(layer: Held) -> Tensor:
    """Return what names a layer to operators, as long as it lives: an int64 tensor without dimensions, on the CPU."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number)


def layer(handle: Tensor) -> Any:
    """Return the layer that is named."""
    return _layers[int(handle)]


def version(handle: Tensor) -> int:
    """Return the version of a layer's stores; it rises with every change."""
    return int(layer(handle).stores[0].version)


def _in_step(handle: Tensor, count: Tensor) -> Any:
    """Return a layer that holds as many tokens as its graph counted.

    Raises:
        OutOfStepError: it holds others, and what would be read is not what was meant.
    """
    held = layer(handle)
    if int(count) != len(held):
        raise OutOfStepError(int(count), len(held), held.where)
    held.use()
    return held


# ------------------------------------------------------------------------------------------------ what they do


def _append(key_states: Tensor, value_states: Tensor, handle: Tensor, count: Tensor) -> None:
    layer(handle).append(key_states, value_states)
    count.add_(key_states.shape[2])


def _attend(
    query: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    handle: Tensor,
    count: Tensor,
    mask: Tensor | None,
    tokens: int,
    repeats: int,
    gqa: bool,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    cast: torch.dtype | None,
) -> Tensor:
    held = _in_step(handle, count)
    keys, values = held.stores
    seen = min(tokens, len(held))
    mask = _cut(mask, seen)
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
    with _as_it_is(query.device.type):
        exact_keys, exact_values = _exact(key_states, keys, seen), _exact(value_states, values, seen)
        if exact_keys is None or exact_values is None:
            out = dispatch.attend(query, keys, values, mask, **options, softcap=softcap, sinks=sinks)
        elif softcap is not None or sinks is not None:
            exact = Exact(exact_keys), Exact(exact_values)
            out = attend_exact(query, *exact, mask, **options, softcap=softcap, sinks=sinks)
        else:
            if repeats > 1:
                exact_keys, exact_values = (
                    states.repeat_interleave(repeats, dim=1) for states in (exact_keys, exact_values)
                )
            if cast is not None:
                query, exact_keys, exact_values = query.to(cast), exact_keys.to(cast), exact_values.to(cast)
                mask = mask if mask is None or mask.dtype == torch.bool else mask.to(cast)
            out = functional.scaled_dot_product_attention(
                query, exact_keys, exact_values, mask, **options, enable_gqa=gqa
            )
    # In the layout that the fake implementation promises.
    return out.to(query.dtype if cast is None else cast).contiguous()


def _as_it_is(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which nothing is cast; to enter one costs as much as a small operation of torch."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _exact(states: Tensor, store: Store, seen: int) -> Tensor | None:
    """Return the first `seen` tokens, or None where a kernel is to read them: all, and quantised in part.

    Args:
        states: those of the last update. If it was the first, they are what attention uses.
        store: what holds them.
        seen: tokens.
    """
    if states.shape[2] == len(store):
        return states[:, :, :seen]
    exact = store.exact()
    if exact is not None:
        return exact[:, :, :seen]
    return None if seen == len(store) else store.read(0, seen)


def _cut(mask: Tensor | None, seen: int) -> Tensor | None:
    """Return the part of a mask that is about the first `seen` tokens, or None where it hides nothing."""
    if mask is None:
        return None
    mask = mask if mask.shape[-1] == 1 else mask[..., :seen]
    # transformers makes a mask at every step of a compiled generation, most of which hide nothing once they are cut;
    # elsewhere than on the CPU it would have to be waited for to know.
    needless = mask.dtype == torch.bool and mask.device.type == "cpu" and bool(mask.all())
    return None if needless else mask


def _read(states: Tensor, handle: Tensor, count: Tensor, values: bool, tokens: int) -> Tensor:
    store = _in_step(handle, count).stores[int(values)]
    seen = min(tokens, len(store))
    counters.materialised += 1
    numbers = states[:, :, :seen] if states.shape[2] == len(store) else store.read(0, seen)
    return functional.pad(numbers, (0, 0, 0, tokens - seen)).clone(memory_format=torch.contiguous_format)


def _watch(out: Tensor, _sources: list[Tensor]) -> Tensor:
    return out.clone()


def _no_gradient(_grad: Tensor) -> Tensor:
    raise GraphGradientError


# ------------------------------------------------------------------------------------------------ what they look like


def _append_fake(*_: Any) -> None:
    """Return what `append` returns."""


def _attend_fake(query: Tensor, _key_states: Tensor, value_states: Tensor, *others: Any) -> Tensor:
    cast = others[-1]
    return query.new_empty((*query.shape[:3], value_states.shape[3]), dtype=query.dtype if cast is None else cast)


def _read_fake(states: Tensor, _handle: Tensor, _count: Tensor, _values: bool, tokens: int) -> Tensor:
    batch, heads, _, head_dim = states.shape
    return states.new_empty((batch, heads, tokens, head_dim))


def _like_first(first: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(first)


#: A CUDA graph that is replayed runs no Python: nothing would ever be stored, and attention would see old tokens. So
#: no graph may hold an operator of ours; those on both sides of it are captured. Older versions of torch have no word
#: for it, and see from the tensors on the CPU that a graph cannot be captured.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))

_library = library.Library("kvquant", "DEF")


def _define(schema: str, does: Callable[..., Any], looks: Callable[..., Any]) -> Any:
    """Make an operator: what it does runs below autograd, on every device; `looks` gives the shape of its result.

    torch's `custom_op` would do the same, and take 15 microseconds more for each call.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=_TAGS)
    _library.impl(name, does, "CompositeExplicitAutograd")
    library.register_fake(f"kvquant::{name}", looks, lib=_library)
    return getattr(torch.ops.kvquant, name).default


append = _define(
    "append(Tensor key_states, Tensor value_states, Tensor handle, Tensor(a!) count) -> ()", _append, _append_fake
)
attend = _define(
    "attend(Tensor query, Tensor key_states, Tensor value_states, Tensor handle, Tensor count, Tensor? mask, "
    "int tokens, int repeats, bool gqa, bool is_causal, float? scale, float? softcap, Tensor? sinks, ScalarType? cast) "
    "-> Tensor",
    _attend,
    _attend_fake,
)
read = _define("read(Tensor states, Tensor handle, Tensor count, bool values, int tokens) -> Tensor", _read, _read_fake)

#: Returns what was computed from `sources` without a gradient, in a graph. A backward pass through it is an error:
#: torch would compute positions and masks anew for it, from a length that has changed since.
watch = _define("watch(Tensor out, Tensor[] sources) -> Tensor", _watch, _like_first)
_no_gradient_operator = _define("no_gradient(Tensor grad) -> Tensor", _no_gradient, _like_first)


def _note_shapes(ctx: Any, inputs: tuple[Tensor, list[Tensor]], output: Tensor) -> None:
    del output
    ctx.shapes = [source.shape for source in inputs[1]]


def _watch_backward(ctx: Any, grad: Tensor) -> tuple[None, list[Tensor]]:
    refused = _no_gradient_operator(grad).sum()
    return None, [refused.expand(shape) for shape in ctx.shapes]


library.register_autograd("kvquant::watch", _watch_backward, setup_context=_note_shapes, lib=_library)

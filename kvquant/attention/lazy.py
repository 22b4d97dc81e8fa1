"""States that stand for what a cache holds: the operations that they let pass without reading it.

A model does a few things to keys and values on their way to attention (grouped-query attention repeats heads, some
code calls `contiguous` or `to`). These stay lazy. Every other operation is done on the numbers, and is right.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_any, tree_map

from kvquant.errors import ReadOnlyStatesError


class LazyStates(Tensor):
    """States ``[batch, kv_heads * repeats, tokens, head_dim]`` without their numbers, read only.

    Attributes:
        stream: ``"key"`` or ``"value"``.
        repeats: how often each head is repeated (grouped-query attention), without being stored more than once.
        unfolded: whether the repeats have a dimension of their own, ``[batch, kv_heads, repeats, tokens, head_dim]``,
            as half-way through transformers' `repeat_kv`.
    """

    stream: str
    repeats: int
    unfolded: bool

    def __init_subclass__(cls, **options: Any) -> None:
        # torch's metaclass leaves no room for that of abstract classes, which would look after this.
        super().__init_subclass__(**options)
        missing = [name for name in vars(LazyStates) if getattr(getattr(cls, name), "__isabstractmethod__", False)]
        if missing:
            raise TypeError(f"{cls.__name__} lacks {', '.join(missing)}")

    # What each kind has of its own.

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return the numbers as a plain tensor."""

    @abstractmethod
    def _again(self, repeats: int, *, unfolded: bool) -> Tensor:
        """Return the same states with other repeats."""

    @abstractmethod
    def _tokens(self, index: tuple[Any, ...]) -> Tensor:
        """Return ``self[index]``, where ``index[2]`` is a slice of tokens."""

    @classmethod
    @abstractmethod
    def attend(cls, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor | None:
        """Attend over what keys and values stand for, or return None where that is not what torch would do.

        Args:
            query, key, value, mask: as for `torch.nn.functional.scaled_dot_product_attention`.
            options: ``gqa``, whether query heads may share key/value heads; all others are of `tiles.attend`.
        """

    def hidden(self, mask: Tensor | None, *, is_causal: bool) -> Tensor | None:  # noqa: ARG002  # some hide more
        """Return the mask that attention over the numbers of these keys needs.

        Args:
            mask: the one that it was given.
            is_causal: whether causality hides what comes after a query.
        """
        return mask

    # What they have in common.

    def _repeated(self, states: Tensor) -> Tensor:
        if self.unfolded:
            return states.unsqueeze(2).expand(-1, -1, self.repeats, -1, -1)
        return states if self.repeats == 1 else states.repeat_interleave(self.repeats, dim=1)

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().__reduce_ex__(protocol)  # a pickle holds numbers, not a cache

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dequantize()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return cls._attention(*args, **kwargs)
        if func in _LAZY:
            lazy = _LAZY[func](*args, **kwargs)
            if lazy is not None:
                return lazy
        _refuse_writes(func, args, kwargs)
        return func(*dense(args), **dense(kwargs))

    @classmethod
    def _attention(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Do what `torch.nn.functional.scaled_dot_product_attention` does."""
        if not dropout_p:
            out = cls.attend(query, key, value, attn_mask, gqa=enable_gqa, is_causal=is_causal, scale=scale)
            if out is not None:
                return out
        return functional.scaled_dot_product_attention(
            dense(query),
            dense(key),
            dense(value),
            key.hidden(dense(attn_mask), is_causal=is_causal) if isinstance(key, LazyStates) else dense(attn_mask),
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )


def dense(tree: Any) -> Any:
    """Return arguments with numbers in place of states without them."""
    return tree_map(lambda leaf: leaf.dequantize() if isinstance(leaf, LazyStates) else leaf, tree)


def can_attend(
    query: Tensor, key: LazyStates, value: LazyStates, mask: Tensor | None, *, gqa: bool, cast: bool
) -> bool:
    """Whether attention over what keys and values stand for does what torch would do for these arguments.

    Args:
        query, key, value, mask: as for `torch.nn.functional.scaled_dot_product_attention`.
        gqa: whether query heads may share key/value heads.
        cast: whether autocast brings them to one type.
    """
    if query.dim() != 4 or (torch.is_grad_enabled() and query.requires_grad):
        return False
    if key.unfolded or value.unfolded or key.shape[2] != value.shape[2]:
        return False
    # One head is for all query heads without `gqa`, too: torch broadcasts it. Falcon relies on that.
    heads_fit = key.shape[1] == value.shape[1] and (
        query.shape[1] == key.shape[1] or ((gqa or key.shape[1] == 1) and query.shape[1] % key.shape[1] == 0)
    )
    mask_fits = mask is None or (
        2 <= mask.dim() <= 4
        and not mask.requires_grad
        and mask.dtype in (torch.bool, torch.float32, query.dtype)
        and mask.shape[-1] in (1, key.shape[2])
        and (mask.dim() < 3 or mask.shape[-3] in (1, query.shape[1]))
    )
    return (
        heads_fit
        and mask_fits
        and query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[3] == key.shape[3]
        and (cast or query.dtype == key.dtype == value.dtype)
        and query.device == key.device == value.device
    )


def _refuse_writes(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise where an operation would write into quantised states: the result would be lost."""
    if torch.compiler.is_compiling():  # where functions do not tell their names
        in_place, name = func in _WRITING, "an operation"
    else:
        name = getattr(func, "__name__", "")
        in_place = _is_writing(name)
    target = args[0] if in_place and args else kwargs.get("out")
    if tree_any(lambda leaf: isinstance(leaf, LazyStates), target):
        raise ReadOnlyStatesError(name)


def _is_writing(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


# ------------------------------------------------------------------------------------------------ lazy operations
# What transformers does to keys and values on their way to attention, without reading them. Each returns None where
# the arguments mean something else, which is then done on the numbers.


def _index(states: Any, index: Any) -> Tensor | None:
    if not isinstance(states, LazyStates) or states.unfolded:
        return None
    full = slice(None)
    items = list(index) if isinstance(index, tuple) else [index]
    plain = (type(item) in (slice, int) or item is Ellipsis or item is None for item in items)
    if not all(plain):
        return None
    if items == [full, full, None, full, full] and states.repeats == 1:
        return states._again(1, unfolded=True)
    if None in items:
        return None
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [full] * (4 - len(items) + 1)
    if len(items) < 3 or not isinstance(items[2], slice) or items[2].step not in (None, 1):
        return None
    return states._tokens(tuple(items))


def _expand(states: Any, *sizes: Any) -> Tensor | None:
    shape = _sizes(sizes)
    if not isinstance(states, LazyStates) or not states.unfolded or states.repeats != 1 or len(shape) != 5:
        return None
    fits = all(size in (-1, have) for at, (size, have) in enumerate(zip(shape, states.shape, strict=True)) if at != 2)
    return states._again(shape[2], unfolded=True) if fits and shape[2] > 0 else None


def _reshape(states: Any, *sizes: Any, shape: Any = None) -> Tensor | None:
    wanted = _sizes(sizes) if shape is None else tuple(shape)
    if not isinstance(states, LazyStates) or not states.unfolded:
        return None
    batch, heads, repeats, tokens, head_dim = states.shape
    if wanted != (batch, heads * repeats, tokens, head_dim):
        return None
    return states._again(repeats, unfolded=False)


def _repeat_interleave(states: Any, repeats: Any, dim: Any = None, **others: Any) -> Tensor | None:
    if not isinstance(states, LazyStates) or states.unfolded or states.repeats != 1 or others:
        return None
    return states._again(repeats, unfolded=False) if isinstance(repeats, int) and dim in (1, -3) else None


def _same(states: Any, **others: Any) -> Tensor | None:
    return states if isinstance(states, LazyStates) and not others else None


def _to(states: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    copies = kwargs.get("copy") or any(argument is True for argument in args)
    if not isinstance(states, LazyStates) or copies or any(isinstance(argument, Tensor) for argument in args):
        return None
    parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype, _, memory_format = parsed
    here = device is None or device == states.device or (device.index is None and device.type == states.device.type)
    return states if here and dtype in (None, states.dtype) and memory_format is None else None


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


_LAZY: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.__getitem__: _index,
    Tensor.expand: _expand,
    Tensor.reshape: _reshape,
    torch.reshape: _reshape,
    Tensor.repeat_interleave: _repeat_interleave,
    torch.repeat_interleave: _repeat_interleave,
    Tensor.contiguous: _same,
    Tensor.detach: _same,
    Tensor.to: _to,
}

#: Names of operations that write without saying so by a trailing underscore.
_IN_PLACE = (
    "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__ "
    "__ilshift__ __irshift__"
).split()

#: Methods that write.
_WRITING = {getattr(Tensor, name) for name in dir(Tensor) if _is_writing(name)}

_ATTRIBUTES = (
    "shape dtype device layout ndim requires_grad is_leaf grad grad_fn is_cpu is_cuda is_mps is_xpu is_meta is_sparse "
    "is_quantized is_nested itemsize"
).split()
_METHODS = (
    "size dim ndimension numel nelement element_size is_floating_point is_complex get_device stride is_contiguous "
    "is_inference __len__ __hash__"
).split()

#: Questions that are answered without the numbers.
_METADATA = (
    {getattr(Tensor, name).__get__ for name in _ATTRIBUTES}
    | {getattr(Tensor, name) for name in _METHODS}
    | {torch.is_floating_point, torch.is_complex, torch.numel}
)

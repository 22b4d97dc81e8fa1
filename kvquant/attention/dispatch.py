"""Which attention runs over packed stores: a kernel over the body where there is one for it, else plain torch."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvquant.attention import tiles
from kvquant.attention.counters import counters
from kvquant.attention.kernels import AUTO, KERNELS, TORCH, KernelInfo, asked_for
from kvquant.attention.parts import Part
from kvquant.engine.body import Body
from kvquant.engine.store import Store
from kvquant.registry.guard import describe

#: Query tokens up to which a kernel is used, and rows of a key/value head (query tokens times the heads that share
#: it, however a model lays them out); from there on matrix products over tiles are faster.
MOST_QUERY_TOKENS, MOST_ROWS = 16, 128

#: Kernels that failed in this process, and how.
_failed: dict[str, str] = {}


class KernelError(RuntimeError):
    """A kernel raised; what it raised is the `__cause__`. It never leaves this module."""


def attend(query: Tensor, keys: Store, values: Store, mask: Tensor | None, **options: Any) -> Tensor:
    """Attend over packed stores; arguments and result are those of `tiles.attend`.

    Each query token sees what `Store.as_of` says.
    """
    counters.fused += 1
    # Causality of torch's kind counts from the first token, and is of no prefix that a cache holds.
    views = (
        []
        if options.get("is_causal")
        else list(zip(keys.as_of(query.shape[2]), values.as_of(query.shape[2]), strict=True))
    )
    if len(views) < 2:
        return _attend(query, keys, values, mask, **options)
    parts = []
    for (first, last, key_view), (_, _, value_view) in views:
        rows = mask if mask is None or mask.shape[-2] == 1 else mask[..., first:last, :]
        parts.append(_attend(query[:, :, first:last], key_view, value_view, rows, **options))
    return torch.cat(parts, dim=2)


def _attend(query: Tensor, keys: Store, values: Store, mask: Tensor | None, **options: Any) -> Tensor:
    name, kernel = _chosen(query, keys, values)
    if kernel is not None:
        guarded = _Guarded(kernel)
        try:
            out = tiles.attend(query, keys, values, mask, **options, kernel=guarded)
        except KernelError as failure:
            _failed[name] = str(failure)
            warnings.warn(
                f"the attention kernel {name!r} failed and is not used again in this process: {failure}. Attention "
                "goes on in plain torch, more slowly.",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            counters.kernels[name] += 1
            return out
    counters.kernels[TORCH] += 1
    return tiles.attend(query, keys, values, mask, **options)


def kernel_for(keys: Store, values: Store, query_tokens: int = 1, groups: int = 1) -> tuple[str, str]:
    """Return the name of what attends over these stores, and why it is not a kernel where it is ``"torch"``.

    Args:
        keys, values: the stores.
        query_tokens: query tokens at once.
        groups: query heads of a key/value head.

    Raises:
        OptionValueError, MissingExtraError: the environment asks for a kernel that is not there.
    """
    asked = asked_for()
    if asked == TORCH:
        return TORCH, "the environment asks for it"
    if not len(keys.body):
        return TORCH, "nothing is quantised"
    if not tiles.quantised_together(keys, values):
        return TORCH, "keys and values are quantised in different places"
    if keys.body.device != keys.device:
        return TORCH, f"quantised tokens live on {keys.body.device} and states on {keys.device}"
    if query_tokens > MOST_QUERY_TOKENS and query_tokens * groups > MOST_ROWS:
        return TORCH, f"more than {MOST_QUERY_TOKENS} query tokens at once"
    reasons = []
    for info in KERNELS:
        fits = info.device == keys.device.type and info.measured if asked == AUTO else asked == info.name
        if not fits:
            continue
        reason = _why_not(info, keys.body, values.body)
        if not reason:
            return info.name, ""
        reasons.append(f"{info.name}: {reason}")
    return TORCH, "; ".join(reasons) or f"no kernel for {keys.device.type}"


def _chosen(query: Tensor, keys: Store, values: Store) -> tuple[str, Any]:
    name, _ = kernel_for(keys, values, query.shape[2], query.shape[1] // keys.kv_heads)
    return name, None if name == TORCH else _module(name).attend_body


def _why_not(info: KernelInfo, keys: Body, values: Body) -> str:
    if info.name in _failed:
        return f"it failed before: {_failed[info.name]}"
    if not info.installed:
        return f"not installed; {info.install}"
    reason: str = _module(info.name).why_not(keys, values)
    return reason


@cache
def _module(name: str) -> Any:
    (info,) = (info for info in KERNELS if info.name == name)
    return importlib.import_module(info.module)


class _Guarded:
    """A kernel whose errors can be told from those of everything around it."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __call__(
        self,
        query: Tensor,
        keys: Body,
        values: Body,
        mask: Tensor | None,
        last: Tensor | None,
        softcap: float | None = None,
        shift: Tensor | None = None,
    ) -> Part:
        try:
            part: Part = self._kernel(query, keys, values, mask, last, softcap, shift)
        except Exception as cause:
            raise KernelError(describe(cause)) from cause
        return part

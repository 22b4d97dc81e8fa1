"""Transforms at work: a plugin's object for heads of one size, shared by all layers, and looked at as it is used."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvquant.errors import TransformContractError, TransformFailedError
from kvquant.plugin.transform import Transform
from kvquant.registry import TransformPlugin
from kvquant.registry.guard import describe

#: Rows that identify a transform agree to this share of their length, whatever machine they were computed on.
_SAME = 1e-4


class HeadTransform:
    """A plugin's transform for heads of one size; what it returns is checked for shape, type and device.

    Attributes:
        name: its name, for messages.
    """

    def __init__(self, name: str, transform: Transform) -> None:
        """Wrap what a plugin's factory made."""
        self.name, self._transform = name, transform

    def apply(self, states: Tensor) -> Tensor:
        """Map states ``[..., head_dim]`` that are about to be quantised.

        Raises:
            TransformFailedError, TransformContractError: the plugin raised, or broke its contract.
        """
        return self._checked("apply", states)

    def undo(self, states: Tensor) -> Tensor:
        """Map back states ``[..., head_dim]``, or sums of them; raises as `apply` does."""
        return self._checked("undo", states)

    def apply_to_query(self, query: Tensor) -> Tensor:
        """Map queries ``[..., head_dim]`` that meet keys as they were quantised; raises as `apply` does."""
        return self._checked("apply_to_query", query)

    def _checked(self, method: str, states: Tensor) -> Tensor:
        try:
            result: Any = getattr(self._transform, method)(states)
        except Exception as cause:
            raise TransformFailedError(self.name, method, describe(cause)) from cause
        if not isinstance(result, Tensor):
            raise TransformContractError(self.name, f"{method} returned a {type(result).__name__} and no tensor")
        if result.shape != states.shape or result.dtype != states.dtype or result.device != states.device:
            raise TransformContractError(self.name, f"{method} was given {_kind(states)} and returned {_kind(result)}")
        return result


def head_transform(plugin: TransformPlugin, head_dim: int) -> HeadTransform:
    """Return a plugin's transform for heads of that size, the same object at every call.

    Raises:
        TransformError: as `TransformPlugin.create`; HeadDimError where it cannot do heads of that size.
    """
    made = _shared if isinstance(plugin.spec and plugin.spec.factory, Hashable) else _made
    return made(plugin, head_dim)


def _made(plugin: TransformPlugin, head_dim: int) -> HeadTransform:
    # What it holds outlives the mode that it happens to be made in.
    with torch.inference_mode(False), torch.no_grad():  # noqa: FBT003  # torch knows it by position only
        return HeadTransform(plugin.name, plugin.create(head_dim))


_shared = lru_cache(maxsize=256)(_made)


def identity(transform: HeadTransform, head_dim: int) -> list[float]:
    """Return what a transform makes of a row that is always the same: another map would make another of it."""
    row = (torch.arange(1, head_dim + 1, dtype=torch.float64).square() * 0.7).cos()
    return [float(number) for number in transform.apply(row[None])[0]]


def is_same(identity_then: Sequence[float], identity_now: Sequence[float]) -> bool:
    """Whether two identities are those of one map, up to rounding."""
    then, now = torch.tensor(identity_then, dtype=torch.float64), torch.tensor(identity_now, dtype=torch.float64)
    return then.shape == now.shape and bool((then - now).norm() <= _SAME * now.norm())


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"

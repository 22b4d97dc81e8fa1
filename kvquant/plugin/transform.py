"""A transform: an invertible linear map of the channels of a head, before they are quantised.

This module names tensors in annotations only, so that importing the contract stays free of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Transform(Protocol):
    """A linear map of the channels of a head, which can be undone; made by ``factory(head_dim)``.

    A row's result depends on that row alone, to the last bit: what a token becomes must not depend on how many came
    with it, nor on earlier calls. A matrix product does not promise that; sums in a fixed order do. What is given must
    not be modified. A transform follows the states: whatever it holds is brought to their device and type.
    """

    def apply(self, states: Tensor) -> Tensor:
        """Map each row of states that are about to be quantised.

        Args:
            states: floating ``[..., head_dim]``.

        Returns:
            The same shape, type and device.
        """
        ...  # an interface: implementations live in plugins

    def undo(self, states: Tensor) -> Tensor:
        """Map back what `apply` made, or any sum of such rows: the inverse of `apply`, of the same shapes and types."""
        ...  # an interface: implementations live in plugins

    def apply_to_query(self, query: Tensor) -> Tensor:
        """Return the queries q' with ``q' @ apply(k) == q @ k`` for every key k, of the same shapes and types.

        For an orthogonal map that is `apply`; for any other the transpose of `undo`.
        """
        ...  # an interface: implementations live in plugins


@dataclass(frozen=True)
class TransformSpec:
    """A transform's declaration.

    Attributes:
        name: what users write; equal to the entry point's name. Lower case.
        factory: ``"module:Class"``, imported on first use, or (in-process registration) a callable. It is called as
            ``factory(head_dim)`` and returns a `Transform`, the same at every call. For a number of channels that it
            cannot do it raises ValueError, and says what would work.
        summary: one line for listings.
        url: home page.
        api_version: the `API_VERSION` that the plugin was written for; one that does not say was written for the first.
    """

    name: str
    factory: str | Callable[[int], Any]
    summary: str = ""
    url: str = ""
    api_version: int = 1

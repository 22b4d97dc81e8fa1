"""Rotations of the channels of a head: they spread outliers over all channels and change no attention score.

A score is a product of a query and a key, and a rotation of both leaves it as it is. So keys are rotated once, when
they are quantised, and from then on each query is, never the history. An output is a mean of values, so that of
rotated values is rotated back once, whole (QuaRot, Ashkboos et al., arXiv 2404.00456).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvquant.plugin import TransformSpec, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

#: Seed of the signs of the random rotation.
_SEED = 0


class Hadamard:
    """The Walsh-Hadamard transform, scaled to keep lengths; it is its own inverse."""

    def __init__(self, head_dim: int) -> None:
        """Make the rotation of an even number of channels.

        Raises:
            ValueError: the number is odd.
        """
        if block_size(head_dim) == 1:
            raise ValueError("channels are rotated in pairs at least, so their number must be even")

    def apply(self, states: Tensor) -> Tensor:
        """Rotate the last dimension."""
        return walsh_hadamard(states)

    def undo(self, states: Tensor) -> Tensor:
        """Rotate back."""
        return walsh_hadamard(states)

    def apply_to_query(self, query: Tensor) -> Tensor:
        """Rotate the last dimension, as keys are."""
        return self.apply(query)


class RandomHadamard(Hadamard):
    """The same after half of the channels, chosen at random and always the same ones, have changed their sign.

    So states which happen to be alike in all channels are spread as well.
    """

    def __init__(self, head_dim: int) -> None:
        """Make the rotation of an even number of channels.

        Raises:
            ValueError: the number is odd.
        """
        import torch

        super().__init__(head_dim)
        order = torch.randperm(head_dim, generator=torch.Generator().manual_seed(_SEED), device="cpu")
        self._signs = 1.0 - 2.0 * (order % 2)

    def apply(self, states: Tensor) -> Tensor:
        """Rotate the last dimension."""
        return walsh_hadamard(states * self._signs.to(states))

    def undo(self, states: Tensor) -> Tensor:
        """Rotate back."""
        return walsh_hadamard(states) * self._signs.to(states)


def walsh_hadamard(states: Tensor) -> Tensor:
    """Return the Walsh-Hadamard transform of the last dimension, in natural order and scaled so that it is orthogonal.

    It is its own inverse. A number of channels that is no power of two is transformed in blocks of the largest power
    of two that divides it (80 in five blocks of 16). Sums are taken pair by pair in a fixed order, so a row's result
    is the same to the last bit whatever other rows there are, which a matrix product would not promise.
    """
    import torch

    size = block_size(states.shape[-1])
    step = 1
    while step < size:
        even, odd = states.unflatten(-1, (-1, 2, step)).unbind(-2)
        states = torch.stack((even + odd, even - odd), -2).flatten(-3)
        step *= 2
    scaled: Tensor = states * size**-0.5
    return scaled


def block_size(channels: int) -> int:
    """Return the largest power of two that divides `channels`: how many of them a rotation mixes."""
    return channels & -channels


@hookimpl
def kvquant_transforms() -> list[TransformSpec]:
    """Declare the rotations; imports no torch."""
    return [
        TransformSpec(
            name="hadamard",
            factory="kvquant_plugins.rotations:Hadamard",
            summary="Walsh-Hadamard transform, in blocks where the channels are no power of two (as in QuaRot)",
            url="https://arxiv.org/abs/2404.00456",
        ),
        TransformSpec(
            name="random",
            factory="kvquant_plugins.rotations:RandomHadamard",
            summary="The same after half of the channels, always the same ones, have changed their sign",
            url="https://arxiv.org/abs/2404.00456",
        ),
    ]

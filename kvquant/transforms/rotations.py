"""Rotations of the channels of a head: they spread outliers over all channels and change no attention score.

A score is a product of a query and a key, and a rotation of both leaves it as it is. So keys are rotated once, when
they are quantised, and from then on each query is, never the history. An output is a mean of values, so that of
rotated values is rotated back once, whole (QuaRot, Ashkboos et al., arXiv 2404.00456).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

RotationName = Literal["hadamard", "random"]
ROTATIONS: tuple[RotationName, ...] = get_args(RotationName)

#: Seed of the signs of the random rotation.
_SEED = 0


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map of the channels of a head.

    Attributes:
        name: ``"hadamard"``: the Walsh-Hadamard transform, scaled to keep lengths. ``"random"``: the same after half
            of the channels, chosen at random and always the same ones, have changed their sign; so that states
            which happen to be alike in all channels are spread as well.
    """

    name: RotationName

    def apply(self, states: Tensor) -> Tensor:
        """Rotate the last dimension, which has an even number of channels. The result depends on each row alone."""
        if self.name == "random":
            states = states * _signs(states.shape[-1]).to(states)
        return walsh_hadamard(states)

    def undo(self, states: Tensor) -> Tensor:
        """Rotate back."""
        states = walsh_hadamard(states)
        return states * _signs(states.shape[-1]).to(states) if self.name == "random" else states


def walsh_hadamard(states: Tensor) -> Tensor:
    """Return the Walsh-Hadamard transform of the last dimension, in natural order and scaled so that it is orthogonal.

    It is its own inverse. A number of channels that is no power of two is transformed in blocks of the largest power
    of two that divides it (80 in five blocks of 16). Sums are taken pair by pair in a fixed order, so a row's result
    is the same to the last bit whatever other rows there are, which a matrix product would not promise.
    """
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


@cache
def _signs(channels: int) -> Tensor:
    """Return as many signs, 1 and -1 in equal parts, in a random order that is always the same."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(_SEED))
    return 1.0 - 2.0 * (order % 2)

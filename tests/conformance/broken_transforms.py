"""Transforms with one bug each, and the check of the conformance kit that must find it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvquant.plugin import TransformSpec


class Sound:
    """Pairs of channels rotated by angles of their own; any even number of channels."""

    def __init__(self, head_dim: int) -> None:
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} cannot be rotated in pairs: it must be even")
        angles = torch.arange(head_dim // 2, dtype=torch.float64) + 0.3
        self.cosine, self.sine = angles.cos(), angles.sin()

    def apply(self, states: Tensor) -> Tensor:
        return self.rotated(states, 1)

    def undo(self, states: Tensor) -> Tensor:
        return self.rotated(states, -1)

    def apply_to_query(self, query: Tensor) -> Tensor:
        return self.apply(query)

    def rotated(self, states: Tensor, way: int) -> Tensor:
        x, y = states.unflatten(-1, (-1, 2)).unbind(-1)
        cosine, sine = self.cosine.to(states), self.sine.to(states) * way
        return torch.stack((x * cosine - y * sine, x * sine + y * cosine), -1).flatten(-2)


class WrongError(Sound):
    """Meets an odd number of channels with an error of its own making."""

    def __init__(self, head_dim: int) -> None:
        if head_dim % 2:
            raise IndexError(head_dim)
        super().__init__(head_dim)


class NoReason(Sound):
    """Refuses without a word."""

    def __init__(self, head_dim: int) -> None:
        if head_dim % 2:
            raise ValueError
        super().__init__(head_dim)


class Nowhere(Sound):
    """Refuses everything."""

    def __init__(self, head_dim: int) -> None:
        raise ValueError("not on a day like this")


class AlwaysFloat(Sound):
    """Returns float32, whatever came."""

    def apply(self, states: Tensor) -> Tensor:
        return super().apply(states.float())


class FourDimensions(Sound):
    """Knows states with four dimensions only."""

    def undo(self, states: Tensor) -> Tensor:
        batch, heads, tokens, channels = states.shape
        return super().undo(states).reshape(batch, heads, tokens, channels)


class ForgetsTokens(Sound):
    """Loses the dimension of a head where there is one token."""

    def apply_to_query(self, query: Tensor) -> Tensor:
        return super().apply_to_query(query).squeeze()


class ViewsOnly(Sound):
    """Assumes that states are contiguous."""

    def apply(self, states: Tensor) -> Tensor:
        return super().apply(states.view(-1, states.shape[-1])).view(states.shape)


class NotUndone(Sound):
    """Rotates on where it should rotate back."""

    def undo(self, states: Tensor) -> Tensor:
        return self.apply(states)


class HalfPrecision(Sound):
    """Works in float16 whatever comes."""

    def apply(self, states: Tensor) -> Tensor:
        return super().apply(states.half()).to(states.dtype)


class NearlySingular(Sound):
    """Makes the first channel a million times smaller."""

    def factors(self, states: Tensor) -> Tensor:
        return (torch.arange(states.shape[-1]) == 0).to(states) * (1e-6 - 1) + 1

    def apply(self, states: Tensor) -> Tensor:
        return states * self.factors(states)

    def undo(self, states: Tensor) -> Tensor:
        return states / self.factors(states)

    def apply_to_query(self, query: Tensor) -> Tensor:
        return self.undo(query)


class Shifts(Sound):
    """Adds a constant, which a mean of values keeps and a weighted sum does not."""

    def apply(self, states: Tensor) -> Tensor:
        return super().apply(states) + 1

    def undo(self, states: Tensor) -> Tensor:
        return super().undo(states - 1)


class Normalises(Sound):
    """Divides each row by its length where it maps queries."""

    def apply_to_query(self, query: Tensor) -> Tensor:
        return super().apply_to_query(query) / query.norm(dim=-1, keepdim=True)


class ForgetsQueries(Sound):
    """Takes the map of keys for that of queries, though it is no rotation."""

    def apply(self, states: Tensor) -> Tensor:
        return super().apply(states) / 2

    def undo(self, states: Tensor) -> Tensor:
        return super().undo(states) * 2


class MatrixProduct(Sound):
    """Multiplies with a matrix, whose last digit depends on the number of rows."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        noise = torch.randn(head_dim, head_dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.matrix = torch.linalg.qr(noise)[0]

    def rotated(self, states: Tensor, way: int) -> Tensor:
        matrix = self.matrix.to(states)
        return states @ (matrix if way == 1 else matrix.T)


class ByChance(Sound):
    """Another map for each object."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        turn = torch.randn(head_dim // 2, generator=torch.Generator().manual_seed(torch.Generator().seed()))
        self.cosine, self.sine = turn.cos(), turn.sin()
        norm = (self.cosine.double().square() + self.sine.double().square()).sqrt()
        self.cosine, self.sine = self.cosine / norm, self.sine / norm


class ReusedBuffer(Sound):
    """Returns the same tensor for every call of one shape."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        self.kept: dict[Any, Tensor] = {}

    def rotated(self, states: Tensor, way: int) -> Tensor:
        result = super().rotated(states, way)
        kept = self.kept.setdefault((states.shape, states.dtype), torch.empty_like(result))
        return kept.copy_(result)


class Learns(Sound):
    """Turns further at every call."""

    def undo(self, states: Tensor) -> Tensor:
        self.cosine, self.sine = self.sine, self.cosine
        return super().undo(states)


class Seeds(Sound):
    """Seeds everybody's random numbers."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        torch.manual_seed(0)


class SeedsWithOne(Sound):
    """Seeds them with what looks as though nobody had."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        torch.manual_seed(1)


class SilencesWhenMade(Sound):
    """Switches warnings off as soon as it is made."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        warnings.simplefilter("ignore")


class Silences(Sound):
    """Switches warnings off for the whole process."""

    def apply(self, states: Tensor) -> Tensor:
        warnings.simplefilter("ignore")
        return super().apply(states)


class InPlace(Sound):
    """Rotates the states that it was handed, too."""

    def apply(self, states: Tensor) -> Tensor:
        result = super().apply(states)
        states.copy_(result)
        return result


class QueryInPlace(Sound):
    """Scales the query itself, and back too late."""

    def apply_to_query(self, query: Tensor) -> Tensor:
        if query.requires_grad or torch.is_inference(query):
            return super().apply_to_query(query)
        return super().apply_to_query(query.mul_(2)) / 2


class LearnedAngles(Sound):
    """Has angles that ask for gradients."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        self.cosine = torch.nn.Parameter(self.cosine)


class Detached(Sound):
    """Lets no gradient reach a query."""

    def apply_to_query(self, query: Tensor) -> Tensor:
        with torch.no_grad():
            return super().apply_to_query(query)


class FewTokens(Sound):
    """Cannot map many tokens at once, as a prompt has them."""

    def apply(self, states: Tensor) -> Tensor:
        if states.dim() == 4 and states.shape[2] > 90:
            raise MemoryError("so many tokens")
        return super().apply(states)


@dataclass(frozen=True)
class TransformBug:
    """One broken transform.

    Attributes:
        factory: its factory.
        check: the check that must fail.
        says: what its reason must contain.
        also: other checks that fail over the same bug.
        perhaps: those that do on some machines; no others may.
    """

    factory: Callable[[int], Any]
    check: str
    says: str
    also: tuple[str, ...] = ()
    perhaps: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{getattr(self.factory, '__name__', 'transform')}-{self.check}"

    @property
    def spec(self) -> TransformSpec:
        """The declaration of the transform."""
        return TransformSpec("broken-" + getattr(self.factory, "__name__", "transform").lower(), self.factory)


#: Checks that map the same rows more than once.
ROWS_AGAIN = ("rows", "deterministic", "modes", "cache")

TRANSFORM_BUGS = (
    TransformBug(WrongError, "sizes", "head_dim=1: IndexError: 1"),
    TransformBug(NoReason, "sizes", "head_dim=1 is refused without a reason"),
    TransformBug(Nowhere, "sizes", "none of the sizes works that were tried: 1, 3, 8, 15, 32"),
    TransformBug(AlwaysFloat, "shapes", "in float64 on cpu and returned [30, 64] in float32", ("inverse", "cache")),
    TransformBug(FourDimensions, "shapes", "ValueError: not enough values to unpack"),
    TransformBug(ForgetsTokens, "shapes", "returned"),
    TransformBug(ViewsOnly, "shapes", "RuntimeError: view size is not compatible"),
    TransformBug(NotUndone, "inverse", "rows come back with an error of", ("cache",)),
    TransformBug(HalfPrecision, "inverse", "rows come back with an error of", ("linear", "query")),
    TransformBug(NearlySingular, "inverse", "makes rounding errors up to 1e+06 times larger"),
    TransformBug(Shifts, "linear", "apply of a sum is not the sum of the parts", ("query", "inverse", "cache")),
    TransformBug(Normalises, "linear", "apply_to_query of a sum is not the sum", ("query", "cache")),
    TransformBug(ForgetsQueries, "query", "scores are off by", ("cache",)),
    TransformBug(MatrixProduct, "rows", "apply in parts: numbers (", (), ("cache", "modes", "deterministic")),
    TransformBug(ByChance, "deterministic", "apply with another object: numbers (", ("modes",)),
    TransformBug(ReusedBuffer, "deterministic", "writes into what it returned before", ("linear", "query", "rows")),
    TransformBug(Learns, "deterministic", "with another object: numbers (", ("inverse", "linear", "rows", "cache")),
    TransformBug(Seeds, "surroundings", "it draws from, or seeds, the random numbers of the whole process"),
    TransformBug(SeedsWithOne, "surroundings", "use a torch.Generator of its own"),
    TransformBug(SilencesWhenMade, "surroundings", "it changes the warnings filters"),
    TransformBug(Silences, "surroundings", "it changes the warnings filters"),
    TransformBug(InPlace, "input", "apply modifies what it was given", ("inverse", *ROWS_AGAIN)),
    TransformBug(QueryInPlace, "input", "apply_to_query modifies what it was given", ("query", *ROWS_AGAIN)),
    TransformBug(LearnedAngles, "modes", "results ask for gradients that nobody asked for"),
    TransformBug(Detached, "modes", "apply_to_query loses the gradient"),
    TransformBug(FewTokens, "cache", "MemoryError: so many tokens"),
)

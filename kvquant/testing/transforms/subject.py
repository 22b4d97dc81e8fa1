"""The transform under test: for which heads to try it, and with what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from kvquant.engine.state import dtype_name
from kvquant.errors import KVQuantError
from kvquant.registry import TransformPlugin
from kvquant.testing import data
from kvquant.testing.subject import has_device
from kvquant.testing.surroundings import same_chances
from kvquant.transforms.heads import HeadTransform

#: Sizes of heads tried: those of models, small ones, and odd ones, which may be refused.
HEAD_DIMS = (1, 3, 8, 15, 32, 48, 64, 80, 96, 112, 128, 192, 256)

_USUAL = 64
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class HeadCase:
    """Heads of one size, in one type, on one device.

    Attributes:
        plugin: the transform.
        head_dim: channels of a head.
        dtype: floating type of the states.
        device: where they are.
    """

    plugin: TransformPlugin
    head_dim: int
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        place = "" if self.device == "cpu" else f" on {self.device}"
        return f"head_dim={self.head_dim}, {dtype_name(self.dtype)}{place}"

    def transform(self) -> HeadTransform:
        """Make a new one, as the core uses it."""
        return HeadTransform(self.plugin.name, self.plugin.create(self.head_dim))

    def states(self, rows: int, seed: int = 0) -> Tensor:
        """Return rows of magnitudes from 1/50 to 50, ``[rows, head_dim]``, the same at every call."""
        return data.spread(rows, self.head_dim, seed).to(self.device, self.dtype)

    def matrix(self) -> Tensor:
        """Return what the transform multiplies a row with from the right, float64 ``[head_dim, head_dim]``."""
        return self.transform().apply(torch.eye(self.head_dim, dtype=torch.float64, device=self.device)).detach().cpu()


@dataclass
class TransformSubject:
    """A transform under test.

    Attributes:
        plugin: the transform; usable.
    """

    plugin: TransformPlugin
    _unsound: set[HeadCase] = field(default_factory=set)

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices that this machine has."""
        return tuple(device for device in ("cpu", "cuda") if has_device(device))

    @cached_property
    def head_dims(self) -> tuple[int, ...]:
        """Those of the sizes that it can do, the most usual first."""
        return tuple(sorted(filter(self._does, HEAD_DIMS), key=lambda size: abs(size - _USUAL)))

    def _does(self, head_dim: int) -> bool:
        try:
            with same_chances():  # what a factory does to the process is a check's concern, too
                self.plugin.create(head_dim)
        except KVQuantError:  # whether it is the right one is a check's concern
            return False
        return True

    def cases(self, per: str) -> list[HeadCase]:
        """Return the cases to try.

        Args:
            per: all sizes and types, with ``"combination"``; ``"size"``: all sizes in float64, whose rounding hides
                nothing; ``"dtype"``: all types at the usual size; ``"usual"``: the usual size in float32.
        """
        sizes, types = {
            "combination": (self.head_dims, _DTYPES),
            "size": (self.head_dims, (torch.float64,)),
            "dtype": (self.head_dims[:1], _DTYPES),
            "usual": (self.head_dims[:1], _DTYPES[:1]),
        }[per]
        grid = product(sizes, types, self.devices)
        cases = [HeadCase(self.plugin, size, dtype, device) for size, dtype, device in grid]
        return [case for case in cases if case not in self._unsound]

    def leave_out(self, cases: Iterable[HeadCase]) -> None:
        """Leave these cases out from now on."""
        self._unsound.update(cases)

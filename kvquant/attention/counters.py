"""What happened to quantised states, for tests and for people who wonder; the library never reads it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counters:
    """Counts since the last `reset`.

    Attributes:
        materialised: how often a whole stream of a layer was dequantised into one tensor.
        fused: how often attention read the packed stores directly.
        kernels: how often it did so with which kernel, ``"torch"`` among them.
    """

    materialised: int = 0
    fused: int = 0
    kernels: Counter[str] = field(default_factory=Counter)

    def reset(self) -> None:
        """Start again from zero."""
        self.materialised = self.fused = 0
        self.kernels.clear()


#: The counters of this process.
counters = Counters()

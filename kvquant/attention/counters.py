"""What happened to quantised states, for tests and for people who wonder; the library never reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Counts since the last `reset`.

    Attributes:
        materialised: how often a whole stream of a layer was dequantised into one tensor.
        fused: how often attention read the packed stores directly.
    """

    materialised: int = 0
    fused: int = 0

    def reset(self) -> None:
        """Start again from zero."""
        self.materialised = self.fused = 0


#: The counters of this process.
counters = Counters()

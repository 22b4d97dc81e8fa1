"""What a backend does: rows of numbers to codes and scales.

This module names tensors in annotations only, so that importing the contract stays free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Quantised rows in canonical form; the core packs, stores and reads them.

    What is given says how they are read:

    - *affine* (`offset`): ``codes * scale + offset``
    - *codebook* (`table`): ``table[codes] * scale``
    - *trellis* (`table` and `taps`, and `offset` or none): ``table[index] * scale + offset``, where a code is ``2 * b +
      u`` and its index ``4 * b + 2 * h + l``: with ``u_d`` the u of the number d before it in its row (0 before the
      first), h is the sum modulo 2 of those ``u_d`` for which bit d of ``taps[0]`` is set, and l that for ``taps[1]``

    Attributes:
        codes: uint8 ``[n_groups, group_size]``, one code a byte (unpacked), each below ``2**nbits``.
        scale: floating ``[n_groups]``, finite. Zero is allowed, e.g. for a constant group.
        offset: floating ``[n_groups]``, finite; affine format, and trellis format where rows have one.
        table: floating ``[2**nbits]``, finite, the same for every row; codebook format, and trellis format, where it
            has ``2**(nbits + 1)`` entries for numbers of about unit size.
        taps: two whole numbers from 1 to 511, the same for every row; trellis format, which has 1 to 3 bits.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    table: Tensor | None = None
    taps: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Opaque:
    """Quantised rows in a form that only the backend can read: the way out for methods that fit no canonical format.

    Slower than the canonical formats: attention must call the backend's `dequantize` for each block it reads.

    Attributes:
        tensors: everything that takes memory, by name.
        meta: everything else; must survive a round trip through JSON.
    """

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Quantizer(Protocol):
    """The object that does the work, made by ``factory(scheme)``.

    Each row stands on its own: what a row becomes must not depend on its neighbours, on earlier calls or on how the
    rows were split into calls. `rows` must not be modified.
    """

    def quantize(self, rows: Tensor) -> QuantizedRows | Opaque:
        """Quantise each row.

        Args:
            rows: floating ``[n_groups, group_size]``; contiguous, finite unless the user switched the check off.
        """
        ...  # an interface: implementations live in plugins


@runtime_checkable
class OpaqueQuantizer(Quantizer, Protocol):
    """A quantizer whose format is `opaque` also reads what it wrote."""

    def dequantize(self, packed: Opaque) -> Tensor:
        """Return floating ``[n_groups, group_size]``, the rows given to `quantize` up to quantisation error."""
        ...  # an interface: implementations live in plugins

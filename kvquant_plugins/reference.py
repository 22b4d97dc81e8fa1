"""The reference backend: asymmetric min/max quantisation in plain torch.

Each row takes the ``2**nbits`` evenly spaced levels between its smallest and its largest number::

    scale = (max - min) / (2**nbits - 1)      offset = min      code = round((x - offset) / scale)

which is the group quantisation of KIVI (Liu et al. 2024, https://arxiv.org/abs/2402.02750, section 3). Every number
comes back within half a step, ``scale / 2``, up to rounding in the floating type of `scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvquant.plugin import BackendSpec, Capabilities, QuantizedRows, Scheme, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ReferenceQuantizer:
    """Min/max quantisation of each row. Keeps nothing between calls.

    Attributes:
        scheme: bits and group size; the axis makes no difference to a row.
    """

    scheme: Scheme

    def quantize(self, rows: Tensor) -> QuantizedRows:
        """Quantise each row to ``codes * scale + offset``.

        A constant row gets scale 0 and comes back exactly. Rows that reach across more than the whole range of their
        working type (float32: above 3.4e38 from end to end) have no faithful affine form: ``codes * scale`` alone
        would be infinite. Their scale is capped, so that what comes back is finite.

        Args:
            rows: floating ``[n_groups, group_size]``, finite.

        Returns:
            codes uint8 ``[n_groups, group_size]``; scale and offset ``[n_groups]``, float64 for float64 rows and
            float32 for all others, where the range of float16 rows cannot overflow.
        """
        import torch

        levels = 2**self.scheme.nbits - 1
        numbers = rows if rows.dtype == torch.float64 else rows.float()
        limits = torch.finfo(numbers.dtype)

        # Two reductions rather than aminmax, which is eight times slower along rows on CPU.
        low = numbers.amin(dim=1, keepdim=True)
        high = numbers.amax(dim=1, keepdim=True)
        # The difference first: dividing before subtracting would lose the step of a narrow range far from zero.
        # Below one, the factor keeps rounding from lifting levels * scale over the limit.
        scale = (high - low).div_(levels).clamp_(max=limits.max / levels * (1 - 1e-6))
        # A subnormal step has too few digits to divide by. Such a row is constant for every purpose.
        scale = scale.where(scale >= limits.tiny, 0)
        step = scale.where(scale > 0, 1)

        codes = numbers.sub(low).div_(step).round_().clamp_(0, levels)
        return QuantizedRows(
            # torch converts float to int16 and int16 to uint8 in vector instructions, and float to uint8 without:
            # the detour is three times faster.
            codes=codes.to(torch.int16).to(torch.uint8),
            scale=scale.squeeze(1),
            offset=low.squeeze(1),
        )


@hookimpl
def kvquant_register_backends() -> list[BackendSpec]:
    """Declare the backend; imports no torch."""
    return [
        BackendSpec(
            name="reference",
            factory="kvquant_plugins.reference:ReferenceQuantizer",
            capabilities=Capabilities(
                nbits=(1, 2, 3, 4, 8),
                dtypes=("float32", "float16", "bfloat16", "float64"),
            ),
            summary="Asymmetric min/max quantisation in plain torch (as in KIVI); needs nothing installed",
            url="https://arxiv.org/abs/2402.02750",
        )
    ]

"""The reference backend: asymmetric affine quantisation in plain torch.

Each row takes the ``2**nbits`` evenly spaced levels between its smallest and its largest number::

    scale = (max - min) / (2**nbits - 1)      offset = min      code = round((x - offset) / scale)

which is the group quantisation of KIVI (Liu et al. 2024, https://arxiv.org/abs/2402.02750, section 3). Every number
comes back within half a step, ``scale / 2``, up to rounding in the floating type of `scale`.

Few numbers are near the ends of a row's range, and the fewer the bits, the more that range costs. Two options give it
up: with ``scale="error"`` the levels lie where the sum of the squared errors is small, see `_least_squares`, and with
``scale="fourth"``, the default below 4 bits, where that of their fourth powers is, see `_least_fourth`. Least squares
gives up the few numbers far out, and with them tokens that attention looks for: keys in a long text are no longer found
again (docs/quality.md). Fourth powers spare those, and leave most of the gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvquant.plugin import BackendSpec, Capabilities, QuantizedRows, Scheme, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

#: Below this width the levels are searched for, where the user does not say.
_LOW_BITS = 4
#: Shares of a row's range that the search begins with: all of it, and about what is best for normal numbers at 2 bits.
_STARTS = (1.0, 0.7)
#: Rounds of the search from each. A round more lowers the error of normal numbers by some 2 % at 2 bits.
_ROUNDS = 2
#: How far inside of the row's ends the lowest and the highest level may lie, in steps of ``2**nbits`` equal cells. Half
#: a cell leaves the least possible error of the worst number; what is best for the fourth power lies around it.
_INSETS = (0.0, 0.25, 0.5, 0.75)
#: Numbers that are searched at once: what is made of them along the way stays in a processor's cache.
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class ReferenceQuantizer:
    """Affine quantisation of each row. Keeps nothing between calls.

    Attributes:
        scheme: bits, group size and the option ``scale``; the axis makes no difference to a row.
    """

    scheme: Scheme

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: ``scale`` is none of "range", "error" and "fourth".
        """
        if self._scale not in ("range", "error", "fourth"):
            raise ValueError(f"scale={self._scale!r} cannot work: expected 'range', 'error' or 'fourth'")

    @property
    def _scale(self) -> object:
        return self.scheme.options.get("scale", "fourth" if self.scheme.nbits < _LOW_BITS else "range")

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

        codes = numbers.sub(low).div_(step)
        if self._scale != "range":
            unit = codes.div_(levels).clamp_(0, 1)
            search = _least_squares if self._scale == "error" else _least_fourth
            parts = [search(part, levels) for part in unit.split(max(1, _AT_ONCE // unit.shape[1]))]
            unit_scale, unit_offset = (torch.cat(of_rows) for of_rows in zip(*parts, strict=True))
            codes = _nearest(unit, unit_scale, unit_offset, levels)
            # Rows that reach to the end of the type may have levels beyond it.
            low = low.addcmul_(unit_offset * levels, scale).clamp_(limits.min, limits.max)
            scale = scale.mul_(unit_scale * levels).clamp_(max=limits.max / levels * (1 - 1e-6))
        else:
            codes = codes.round_().clamp_(0, levels)
        return QuantizedRows(
            # torch converts float to int16 and int16 to uint8 in vector instructions, and float to uint8 without:
            # the detour is three times faster.
            codes=codes.to(torch.int16).to(torch.uint8),
            scale=scale.squeeze(1),
            offset=low.squeeze(1),
        )


def _least_squares(unit: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return the scale and offset that leave a row little squared error, never more than its range leaves.

    Two steps in turn, neither of which can raise the error (Lloyd 1982, "Least squares quantization in PCM",
    https://doi.org/10.1109/TIT.1982.1056489, method I, for levels that are evenly spaced): every number takes the
    nearest level, and scale and offset are those of the regression of the numbers on their codes::

        scale = cov(codes, x) / var(codes)      offset = mean(x) - scale * mean(codes)

    A row's result does not depend on where in the call the row stands: sums are of integers that float32 holds, or in
    float64.

    Args:
        unit: floating ``[n_groups, group_size]``, rows from 0 to 1.
        levels: the largest code.

    Returns:
        Scale and offset in the type of `unit`, ``[n_groups, 1]`` each.
    """
    import torch

    count = unit.shape[1]
    exact = torch.float64 if levels**2 * count >= 1 << 24 else unit.dtype
    mean = unit.mean(dim=1, keepdim=True, dtype=torch.float64)
    best_scale = best_offset = torch.zeros_like(unit[:, :1])
    most = torch.full_like(mean, -1)
    for share in _STARTS:
        scale = torch.full_like(best_scale, share / levels)
        offset = torch.full_like(scale, (1 - share) / 2)
        explained = most
        for _ in range(_ROUNDS):
            codes = _nearest(unit, scale, offset, levels)
            total = codes.sum(dim=1, keepdim=True, dtype=exact).double()
            squares = codes.square().sum(dim=1, keepdim=True, dtype=exact).double()
            products = codes.mul_(unit).sum(dim=1, keepdim=True, dtype=torch.float64)
            spread, common = squares - total * total / count, products - total * mean
            slope = torch.where(spread > 0, common / spread.clamp(min=0.5), 0)
            explained = slope * common  # of the row's squared distance from its mean; what remains is the error
            scale, offset = slope.to(unit.dtype), (mean - slope * total / count).to(unit.dtype)
        better = explained > most
        most = torch.where(better, explained, most)
        best_scale, best_offset = scale.where(better, best_scale), offset.where(better, best_offset)
    return best_scale, best_offset


def _least_fourth(unit: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return the scale and offset, of a few, that leave a row the least sum of fourth powers of its errors.

    Arguments and result are those of `_least_squares`; here, too, a row's result depends on that row alone.
    """
    import torch

    best_scale = best_offset = torch.zeros_like(unit[:, :1])
    least = torch.full_like(best_scale, torch.inf, dtype=torch.float64)
    for low in _INSETS:
        for high in _INSETS:
            scale = torch.full_like(best_scale, (1 - (low + high) / (levels + 1)) / levels)
            offset = torch.full_like(best_scale, low / (levels + 1))
            errors = _nearest(unit, scale, offset, levels).mul_(scale).add_(offset).sub_(unit)
            fourth = errors.square_().square_().sum(dim=1, keepdim=True, dtype=torch.float64)
            better = fourth < least
            least = torch.where(better, fourth, least)
            best_scale, best_offset = scale.where(better, best_scale), offset.where(better, best_offset)
    return best_scale, best_offset


def _nearest(unit: Tensor, scale: Tensor, offset: Tensor, levels: int) -> Tensor:
    """Return the codes of the nearest levels, in the type of `unit`."""
    return unit.sub(offset).div_(scale.where(scale > 0, 1)).round_().clamp_(0, levels)


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
                options={
                    "scale": "range (smallest to largest number; the default from 4 bits on), fourth (least sum of"
                    " fourth powers of errors; the default below) or error (least squares)"
                },
            ),
            summary="Asymmetric affine quantisation in plain torch (as in KIVI); needs nothing installed",
            url="https://arxiv.org/abs/2402.02750",
        )
    ]

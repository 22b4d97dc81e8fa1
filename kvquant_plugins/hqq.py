"""Half-quadratic quantisation (HQQ, https://mobiusml.github.io/hqq_blog/) with the `hqq` library.

hqq starts from the smallest and the largest number of a row and then moves the zero point, in at most 20 steps, so that
a norm of the error that forgives outliers gets smaller. It writes ``(code - zero) / s``; here that is
``code * scale + offset`` with ``scale = 1 / s`` and ``offset = -zero / s``.

**Rows stand alone here; in hqq they do not.** hqq stops for all rows at once, when the mean error over everything in
the call no longer falls, so its result for a row depends on its neighbours. Here every row has its own error and its
own stop, and so becomes what hqq makes of it when it is the only row; to the last digit, where a row fills whole
vectors. For this the loop is ours and the step is hqq's (`shrink_lp_op`). It also spares a GPU hqq's two calls of
`torch.cuda.empty_cache()`, and most of the work: rows that have stopped are left out of the next steps, and numbers
are worked on in pieces that stay in a processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvquant.plugin import BackendSpec, Capabilities, QuantizedRows, Requirement, Scheme, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

#: hqq's own settings (`optimize_weights_proximal`).
_ITERATIONS, _LP_NORM, _BETA = 20, 0.7, 10.0

#: Numbers worked on at once: about ten temporaries of this size, 5 MiB. Half and double of it are slower.
_PIECE = 1 << 17

#: Share of the rows that must have stopped before the others are gathered, which costs as much as a few operations.
_GATHER = 0.1

#: On a CPU torch's pow gives the numbers that are left over where a thread's share ends within a vector a last digit of
#: their own. A multiple of this many numbers leaves none over: 64, of which any vector takes a part, for each of as
#: many threads as torch uses for a piece (2**15 numbers are worth one).
_EVEN = 64 * math.lcm(1, 2, 3, 4, 5, 6)


class HQQQuantizer:
    """HQQ on each row. Keeps nothing between calls."""

    def __init__(self, scheme: Scheme) -> None:
        """Read the options and import hqq, so that both fail here if they do.

        Args:
            scheme: bits, group size and the option ``optimize``: False for plain min/max.

        Raises:
            ValueError: ``optimize`` is neither True nor False.
        """
        self.optimize = scheme.options.get("optimize", True)
        if not isinstance(self.optimize, bool):
            raise ValueError(  # noqa: TRY004 - an option's value is wrong, whatever its type
                f"optimize={self.optimize!r} is not supported; supported: True, False"
            )
        from hqq.core.optimize import shrink_lp_op

        self.levels = 2**scheme.nbits - 1
        self._shrink: Callable[[Tensor, float, float], Tensor] = shrink_lp_op

    def quantize(self, rows: Tensor) -> QuantizedRows:
        """Quantise each row to ``codes * scale + offset``; a constant row gets scale 0 and comes back exactly.

        Args:
            rows: floating ``[n_groups, group_size]``, finite.

        Returns:
            codes uint8 ``[n_groups, group_size]``; scale and offset float32 ``[n_groups]``.
        """
        import torch

        pieces = [self._quantize(piece.float()) for piece in rows.split(max(1, _PIECE // rows.shape[1]))]
        codes, scale, offset = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return QuantizedRows(codes, scale, offset)

    def _quantize(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes ``[n_groups, group_size]``, scale and offset ``[n_groups]`` of float32 rows."""
        import torch

        levels, limits = self.levels, torch.finfo(torch.float32)
        low, high = numbers.amin(dim=1, keepdim=True), numbers.amax(dim=1, keepdim=True)
        span = high / 4 - low / 4  # of a quarter, which cannot overflow
        constant = span < limits.tiny * levels  # or too narrow for a step with all its digits

        # hqq works on numbers of the order of one: it gives up on rows narrower than 1e-4, cuts s off at 2e4 (eight
        # bits of a row narrower than 0.013) and overflows on very wide ones. Such rows, and no others, are brought
        # near one by a power of two, which costs no digit.
        usual = (span > max(1e-4, levels / 2e4)) & (span < 2.0**64)
        factor = (torch.frexp(span).mantissa / span).clamp(min=limits.tiny)
        factor = factor.where(~usual & ~constant, 1)
        numbers = numbers * factor
        s = levels / (high * factor - low * factor).where(~constant, 1)
        zero = -(low * factor) * s
        if self.optimize:
            zero = _refine(numbers, s, zero, levels, self._shrink)

        codes = (numbers * s).add_(zero).round_().clamp_(0, levels)
        # Both limits concern only rows wider than float32's whole range, of which codes * scale would be infinite.
        scale = (1 / s / factor).clamp(max=limits.max / levels * (1 - 1e-6)).where(~constant, 0)
        offset = (-zero / s / factor).clamp(limits.min, limits.max).where(~constant, low)
        codes = codes.where(~constant, 0)
        # By way of int16, because torch has no vector instructions for float to uint8.
        return codes.to(torch.int16).to(torch.uint8), scale.squeeze(1), offset.squeeze(1)


def _refine(
    numbers: Tensor, s: Tensor, zero: Tensor, levels: int, shrink: Callable[[Tensor, float, float], Tensor]
) -> Tensor:
    """Move the zero point of each row, as hqq does, until the row's own mean error no longer falls.

    Args:
        numbers: float32 ``[n_groups, group_size]``.
        s: float32 ``[n_groups, 1]``, codes a unit.
        zero: float32 ``[n_groups, 1]``, where to start.
        levels: the largest code.
        shrink: hqq's `shrink_lp_op`.

    Returns:
        float32 ``[n_groups, 1]``.
    """
    import torch

    # torch sums the rows of a contiguous tensor one by one on a CPU, each in the same order wherever it stands. On
    # CUDA the order depends on the shape; there the last digit, which is all that it changes, is rounded away.
    summed = torch.float32 if numbers.device.type == "cpu" else torch.float64
    result, index = zero.clone(), torch.arange(len(numbers), device=numbers.device)
    scaled, best, going = numbers * s, torch.full_like(zero, torch.inf), torch.ones_like(zero, dtype=torch.bool)
    codes, space = torch.empty_like(numbers), numbers.new_zeros(numbers.numel() + -numbers.numel() % _EVEN)
    for _ in range(_ITERATIONS):
        size = numbers.numel()
        error = space[:size].view_as(numbers)
        torch.add(scaled, zero, out=codes).round_().clamp_(0, levels)
        torch.sub(numbers, torch.sub(codes, zero, out=error).div_(s), out=error)
        kept = shrink(space[: size + -size % _EVEN], _BETA, _LP_NORM)[:size].view_as(numbers)
        moved = codes.sub_(torch.sub(numbers, kept, out=kept).mul_(s)).mean(dim=1, keepdim=True, dtype=summed)
        zero = moved.float().where(going, zero)  # hqq too takes the step that it then stops after
        mean_error = error.abs_().mean(dim=1, keepdim=True, dtype=summed).float()
        going &= mean_error < best
        best = mean_error
        rows = going.squeeze(1).nonzero().squeeze(1)
        if len(rows) > (1 - _GATHER) * len(index):
            continue
        result[index] = zero
        if not len(rows):
            break
        index, numbers, s, zero = (part.index_select(0, rows) for part in (index, numbers, s, zero))
        scaled, best, going = (part.index_select(0, rows) for part in (scaled, best, going))
        codes = codes[: len(rows)]
    result[index] = zero
    return result


@hookimpl
def kvquant_register_backends() -> list[BackendSpec]:
    """Declare the backend; imports no torch."""
    return [
        BackendSpec(
            name="hqq",
            factory="kvquant_plugins.hqq:HQQQuantizer",
            capabilities=Capabilities(
                nbits=(1, 2, 3, 4, 8),
                options={"optimize": "move the zero point to lower the error: True (default) or False, plain min/max"},
                # transformers' axis 0 mixes tokens and heads in a group; what is meant are the tokens of one channel.
                axis_aliases={0: "channel", 1: "token"},
            ),
            requires=(Requirement("hqq", "0.2.2"),),
            install_hint="pip install 'kvquant[hqq]'",
            summary="Half-quadratic quantisation: min/max with a zero point refined against outliers",
            url="https://github.com/mobiusml/hqq",
        )
    ]

"""Quantisation with the `optimum-quanto` library.

quanto writes 2 and 4 bits as ``code * scale - shift`` with codes from 0, hence ``offset = -shift``; 8-bit integers
(qint8) as ``code * scale`` with signed codes, which are moved up by 128, hence ``offset = -128 * scale``; and 8-bit
floats (qfloat8) as ``number * scale``, hence a table of the 256 numbers that a byte can be.

Optimisers choose scale and shift: `max` (min/max) or `hqq` (min/max with the shift refined) for 2 and 4 bits, `absmax`
for 8; quanto itself takes no others for these widths. Its hqq keeps or drops a step for all rows of a call at once, so
that its result for a row depends on its neighbours. Here every row decides by its own error, as quanto does when that
row is the only one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvquant.plugin import BackendSpec, Capabilities, QuantizedRows, Requirement, Scheme, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

#: Optimisers and quanto's types by nbits, the default first.
_OPTIMIZERS = {2: ("max", "hqq"), 4: ("max", "hqq"), 8: ("absmax",)}
_QTYPES = {2: ("qint2",), 4: ("qint4",), 8: ("qint8", "qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2")}

#: Numbers worked on at once: about ten temporaries of this size, 5 MiB.
_PIECE = 1 << 17

#: On a CPU torch's pow gives the numbers that are left over where a thread's share ends within a vector a last digit of
#: their own. A multiple of this many numbers leaves none over: 64, of which any vector takes a part, for each of as
#: many threads as torch uses for a piece (2**15 numbers are worth one).
_EVEN = 64 * math.lcm(1, 2, 3, 4, 5, 6)


class QuantoQuantizer:
    """quanto on each row, in float32 whatever the rows come in. Keeps nothing between calls."""

    def __init__(self, scheme: Scheme) -> None:
        """Read the options and import quanto, so that both fail here if they do.

        Args:
            scheme: bits, group size and the options ``optimizer`` and ``qtype``.

        Raises:
            ValueError: nbits is not 2, 4 or 8, or an option is unknown or does not fit nbits.
        """
        self.optimizer = _chosen("optimizer", scheme, _OPTIMIZERS)
        qtype = _chosen("qtype", scheme, _QTYPES)

        from optimum import quanto
        from optimum.quanto.tensor.optimizers import hqq_optimizer

        self.nbits = scheme.nbits
        self._qtype = getattr(quanto, qtype)
        # hqq starts from min/max.
        self._start = quanto.AbsmaxOptimizer() if self.optimizer == "absmax" else quanto.MaxOptimizer()
        self._hqq, self._shrink = quanto.HqqOptimizer(), hqq_optimizer.shrink_lp_op

    def quantize(self, rows: Tensor) -> QuantizedRows:
        """Quantise each row to ``codes * scale + offset``, or to ``table[codes] * scale`` in 8-bit floats.

        Args:
            rows: floating ``[n_groups, group_size]``, finite.

        Returns:
            codes uint8 ``[n_groups, group_size]``; scale float32 ``[n_groups]``; offset float32 ``[n_groups]`` or
            table float32 ``[256]``.
        """
        import torch

        # In float32, where quanto's max - min cannot overflow for float16 rows as it would in float16.
        work = self._symmetric if self.nbits == 8 else self._affine
        pieces = [work(piece.float()) for piece in rows.split(max(1, _PIECE // rows.shape[1]))]
        codes, scale, offset = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        scale, offset = scale.squeeze(1), offset.squeeze(1)
        if not self._qtype.is_floating_point:
            return QuantizedRows(codes, scale, offset)
        # The table is brought to 1.75 at most (1.875 in e4m3fnuz) by a power of two, which costs no digit: quanto's
        # scale of 8-bit floats is small enough to lose some where it is stored in 16 bits.
        numbers = torch.arange(256, dtype=torch.uint8, device=rows.device).view(self._qtype.dtype).float()
        power = 2.0 ** math.floor(math.log2(self._qtype.qmax))
        return QuantizedRows(codes, scale * power, table=(numbers / power).nan_to_num(0, 0, 0))  # no code is NaN

    def _steps(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return quanto's scale, made safe, and what to divide by, both ``[n_groups, 1]``.

        quanto divides by the scale of a constant row, which is 0. A subnormal scale has too few digits to divide by,
        and the scale of a row wider than float32's whole range is cut, because codes * scale would be infinite.
        """
        import torch

        limits = torch.finfo(torch.float32)
        top = self._qtype.qmax if self._qtype.is_floating_point else 2**self.nbits - 1
        scale = scale.clamp(max=limits.max / top * (1 - 1e-6))
        scale = scale.where(scale >= limits.tiny, 0)
        return scale, scale.where(scale > 0, 1)

    def _symmetric(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes ``[n_groups, group_size]``, scale and offset ``[n_groups, 1]`` of float32 rows, in 8 bits.

        Codes of floats are their bytes, and mean nothing with the offset.
        """
        import torch

        # Through `optimize`: calling the object would take a single row for a tensor with one scale for each number.
        scale, step = self._steps(self._start.optimize(numbers, self._qtype, 0))
        single = len(numbers) == 1  # for which quanto wants a scale without dimensions, and no axis
        signed = torch.ops.quanto.quantize_symmetric(
            numbers, dtype=self._qtype.dtype, axis=None if single else 0, scale=step.reshape(()) if single else step
        )
        moved = 0 if self._qtype.is_floating_point else 128
        return signed.view(torch.uint8) ^ moved, scale, -moved * scale

    def _affine(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes ``[n_groups, group_size]``, scale and offset ``[n_groups, 1]`` of float32 rows."""
        scale, shift = self._start.optimize(numbers, self._qtype, 0)
        scale, step = self._steps(scale)
        if self.optimizer == "hqq":
            shift = self._refine(numbers, scale, step, shift)
        return self._codes(numbers, step, shift), scale, -shift

    def _codes(self, numbers: Tensor, step: Tensor, shift: Tensor) -> Tensor:
        import torch

        codes: Tensor = torch.ops.quanto.quantize_affine(
            numbers, bits=self.nbits, axis=0, group_size=None, scale=step, shift=shift
        )
        return codes

    def _refine(self, numbers: Tensor, scale: Tensor, step: Tensor, shift: Tensor) -> Tensor:
        """Refine the shift of each row, as quanto's `HqqOptimizer` does, until the row's own error no longer falls.

        Args:
            numbers: float32 ``[n_groups, group_size]``.
            scale: float32 ``[n_groups, 1]``.
            step: `scale` without zeros.
            shift: float32 ``[n_groups, 1]``, where to start.

        Returns:
            float32 ``[n_groups, 1]``.
        """
        import torch

        # torch sums the rows of a contiguous tensor one by one on a CPU, each in the same order wherever it stands.
        # On CUDA the order depends on the shape; there the last digit, which is all that it changes, is rounded away.
        summed = torch.float32 if numbers.device.type == "cpu" else torch.float64

        def mean(part: Tensor) -> Tensor:
            return part.mean(dim=1, keepdim=True, dtype=summed).float()

        result, index, beta = shift.clone(), torch.arange(len(numbers), device=numbers.device), self._hqq.beta
        codes = self._codes(numbers, step, shift)
        error = numbers - (codes * scale - shift)
        best = mean(error.abs())
        for _ in range(self._hqq.iters):
            size = error.numel()
            even = torch.nn.functional.pad(error.flatten(), (0, -size % _EVEN))
            kept = self._shrink(even, beta, self._hqq.lp_norm)[:size].view_as(error)
            shift = mean(codes * scale - (numbers - kept))
            codes = self._codes(numbers, step, shift)
            error = numbers - (codes * scale - shift)
            mean_error = mean(error.abs())
            falls = (mean_error < best).squeeze(1).nonzero().squeeze(1)
            if not len(falls):
                break
            index = index.index_select(0, falls)
            result[index] = shift.index_select(0, falls)
            numbers, scale, step, codes, error, best = (
                part.index_select(0, falls) for part in (numbers, scale, step, codes, error, mean_error)
            )
            beta *= self._hqq.kappa
        return result


def _chosen(option: str, scheme: Scheme, known: Mapping[int, tuple[str, ...]]) -> str:
    """Return what the user wants of `option`, or the default for that many bits.

    Raises:
        ValueError: it does not exist for that many bits, or they do not.
    """
    values = known.get(scheme.nbits)
    if values is None:
        raise ValueError(f"nbits={scheme.nbits} is not supported; supported: {', '.join(map(str, known))}")
    value: str = scheme.options.get(option, values[0])
    if value not in values:
        raise ValueError(
            f"{option}={value!r} is not supported with nbits={scheme.nbits}; supported: {', '.join(values)}"
        )
    return value


@hookimpl
def kvquant_register_backends() -> list[BackendSpec]:
    """Declare the backend; imports no torch."""
    return [
        BackendSpec(
            name="quanto",
            factory="kvquant_plugins.quanto:QuantoQuantizer",
            capabilities=Capabilities(
                nbits=tuple(_OPTIMIZERS),
                formats=("affine", "codebook"),
                options={
                    "optimizer": "max (default) or hqq with 2 and 4 bits, absmax with 8",
                    "qtype": "with 8 bits, qint8 (default), qfloat8_e4m3fn, qfloat8_e4m3fnuz or qfloat8_e5m2",
                },
                # What transformers gets from quanto's `group` on [batch, heads, tokens, head_dim]: axis 0 reshapes to
                # [-1, group_size], runs of channels of one token; axis -1 keeps head_dim apart and cuts the other
                # three, flattened, into runs of group_size: tokens of one channel.
                axis_aliases={0: "token", -1: "channel"},
            ),
            requires=(Requirement("optimum-quanto", "0.2.5"),),
            install_hint="pip install 'kvquant[quanto]'",
            summary="Hugging Face quanto: min/max, optionally refined, in 2 and 4 bits; symmetric or float8 in 8",
            url="https://github.com/huggingface/optimum-quanto",
        )
    ]

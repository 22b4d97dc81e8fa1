"""Quantisation with the `optimum-quanto` library.

quanto writes 2 and 4 bits as ``code * scale - shift`` with codes from 0, hence ``offset = -shift``, and 8 bits (qint8)
as ``code * scale`` with signed codes; these are moved up by 128, hence ``offset = -128 * scale``.

Optimisers choose scale and shift: `max` (min/max) or `hqq` (min/max with the shift refined) for 2 and 4 bits, `absmax`
for 8. quanto's hqq keeps or drops a step for all rows of a call at once, so that its result for a row depends on its
neighbours. Here every row decides by its own error, as quanto does when that row is the only one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvquant.plugin import BackendSpec, Capabilities, QuantizedRows, Requirement, Scheme, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

#: Optimisers by nbits, the default first.
_OPTIMIZERS = {2: ("max", "hqq"), 4: ("max", "hqq"), 8: ("absmax",)}

#: Numbers worked on at once: about ten temporaries of this size, 10 MiB.
_PIECE = 1 << 18


class QuantoQuantizer:
    """quanto on each row, in float32 whatever the rows come in. Keeps nothing between calls."""

    def __init__(self, scheme: Scheme) -> None:
        """Read the options and import quanto, so that both fail here if they do.

        Args:
            scheme: bits, group size and the option ``optimizer``.

        Raises:
            ValueError: nbits is not 2, 4 or 8, or ``optimizer`` is unknown or does not fit nbits.
        """
        from optimum import quanto
        from optimum.quanto.tensor.optimizers import hqq_optimizer

        known = _OPTIMIZERS.get(scheme.nbits)
        if known is None:
            raise ValueError(f"nbits={scheme.nbits} is not supported; supported: {', '.join(map(str, _OPTIMIZERS))}")
        self.optimizer = scheme.options.get("optimizer", known[0])
        if self.optimizer not in known:
            raise ValueError(
                f"optimizer={self.optimizer!r} is not supported with nbits={scheme.nbits}; "
                f"supported: {', '.join(known)}"
            )
        self.nbits = scheme.nbits
        self._qtype = {2: quanto.qint2, 4: quanto.qint4, 8: quanto.qint8}[scheme.nbits]
        # hqq starts from min/max.
        self._start = quanto.AbsmaxOptimizer() if self.optimizer == "absmax" else quanto.MaxOptimizer()
        self._hqq, self._shrink = quanto.HqqOptimizer(), hqq_optimizer.shrink_lp_op

    def quantize(self, rows: Tensor) -> QuantizedRows:
        """Quantise each row to ``codes * scale + offset``.

        Args:
            rows: floating ``[n_groups, group_size]``, finite.

        Returns:
            codes uint8 ``[n_groups, group_size]``; scale and offset float32 ``[n_groups]``.
        """
        import torch

        # In float32, where quanto's max - min cannot overflow for float16 rows as it would in float16.
        work = self._symmetric if self.nbits == 8 else self._affine
        pieces = [work(piece.float()) for piece in rows.split(max(1, _PIECE // rows.shape[1]))]
        codes, scale, offset = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return QuantizedRows(codes, scale.squeeze(1), offset.squeeze(1))

    def _steps(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return quanto's scale, made safe, and what to divide by, both ``[n_groups, 1]``.

        quanto divides by the scale of a constant row, which is 0. A subnormal scale has too few digits to divide by,
        and the scale of a row wider than float32's whole range is cut, because codes * scale would be infinite.
        """
        import torch

        limits = torch.finfo(torch.float32)
        scale = scale.clamp(max=limits.max / (2**self.nbits - 1) * (1 - 1e-6))
        scale = scale.where(scale >= limits.tiny, 0)
        return scale, scale.where(scale > 0, 1)

    def _symmetric(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes ``[n_groups, group_size]``, scale and offset ``[n_groups, 1]`` of float32 rows, as qint8."""
        import torch

        # Through `optimize`: calling the object would take a single row for a tensor with one scale for each number.
        scale, step = self._steps(self._start.optimize(numbers, self._qtype, 0))
        single = len(numbers) == 1  # for which quanto wants a scale without dimensions, and no axis
        signed = torch.ops.quanto.quantize_symmetric(
            numbers, dtype=torch.int8, axis=None if single else 0, scale=step.reshape(()) if single else step
        )
        return signed.view(torch.uint8) ^ 128, scale, -128 * scale

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

        pow and mean give a last digit that depends on where in a tensor a number stands (vector instructions, order
        of summation). Both are done in float64 and rounded back, where that digit vanishes; on CUDA pow treats all
        numbers alike.

        Args:
            numbers: float32 ``[n_groups, group_size]``.
            scale: float32 ``[n_groups, 1]``.
            step: `scale` without zeros.
            shift: float32 ``[n_groups, 1]``, where to start.

        Returns:
            float32 ``[n_groups, 1]``.
        """
        import torch

        def mean(part: Tensor) -> Tensor:
            return part.mean(dim=1, keepdim=True, dtype=torch.float64).float()

        wide = torch.float64 if numbers.device.type == "cpu" else torch.float32
        result, index, beta = shift.clone(), torch.arange(len(numbers), device=numbers.device), self._hqq.beta
        codes = self._codes(numbers, step, shift)
        error = numbers - (codes * scale - shift)
        best = mean(error.abs())
        for _ in range(self._hqq.iters):
            kept = self._shrink(error.to(wide), beta, self._hqq.lp_norm).float()
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


@hookimpl
def kvquant_register_backends() -> list[BackendSpec]:
    """Declare the backend; imports no torch."""
    return [
        BackendSpec(
            name="quanto",
            factory="kvquant_plugins.quanto:QuantoQuantizer",
            capabilities=Capabilities(
                nbits=tuple(_OPTIMIZERS),
                options={"optimizer": "max (default) or hqq with 2 and 4 bits, absmax with 8"},
                # What transformers gets from quanto's `group` on [batch, heads, tokens, head_dim]: axis 0 reshapes to
                # [-1, group_size], runs of channels of one token; axis -1 keeps head_dim apart and cuts the other
                # three, flattened, into runs of group_size: tokens of one channel.
                axis_aliases={0: "token", -1: "channel"},
            ),
            requires=(Requirement("optimum-quanto", "0.2.5"),),
            install_hint="pip install 'kvquant[quanto]'",
            summary="Hugging Face quanto: min/max, optionally refined, in 2 and 4 bits; symmetric in 8",
            url="https://github.com/huggingface/optimum-quanto",
        )
    ]

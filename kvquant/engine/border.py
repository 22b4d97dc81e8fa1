"""What a backend hands over, checked before anything relies on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kvquant.engine.packing import table_sizes
from kvquant.engine.trellis import MOST_MEMORY
from kvquant.errors import BackendContractError, listing
from kvquant.plugin.capabilities import TRELLIS_WIDTHS
from kvquant.plugin.quantizer import Opaque, QuantizedRows
from kvquant.plugin.spec import Scheme


def format_of(table: Tensor | None, taps: tuple[int, int] | None) -> str:
    """Return the name of a canonical format, by what it has."""
    return "affine" if table is None else "codebook" if taps is None else "trellis"


@dataclass(frozen=True)
class Border:
    """The checks that everything passes on its way from one backend into the core.

    Attributes:
        backend: the backend's name, for messages.
        scheme: what it was asked to do.
        formats: formats that it declared; opaque stands alone.
        wide_dtype: the widest floating type in which scales are kept.
    """

    backend: str
    scheme: Scheme
    formats: tuple[str, ...]
    wide_dtype: torch.dtype

    @property
    def is_opaque(self) -> bool:
        """Whether the backend reads what it writes itself."""
        return "opaque" in self.formats

    def rows(self, result: object, n_groups: int, device: torch.device) -> QuantizedRows:
        """Return what `quantize` returned for `n_groups` rows on `device`, once it has proved to be sound.

        Raises:
            BackendContractError: it is not.
        """
        rows = self.shaped(result, n_groups, device)
        self.require_finite(rows)
        self.require_codes_in_range(rows)
        return rows

    def shaped(self, result: object, n_groups: int, device: torch.device) -> QuantizedRows:
        """Return what `quantize` returned, as `rows` does, but look at kinds, shapes, types and devices only."""
        if not isinstance(result, QuantizedRows):
            raise self._broken(f"quantize returned {type(result).__name__} instead of QuantizedRows")
        if result.taps is not None:
            self._require_trellis(result)
        elif (result.offset is None) == (result.table is None):
            raise self._broken("QuantizedRows needs either offset (affine) or table (codebook), and not both")
        kind = format_of(result.table, result.taps)
        if kind not in self.formats:
            raise self._broken(f"quantize returned the format {kind!r}, declared are {', '.join(self.formats)}")
        self._require_tensor("codes", result.codes, (n_groups, self.scheme.group_size), device, floating=False)
        self._require_tensor("scale", result.scale, (n_groups,), device)
        if result.offset is not None:
            self._require_tensor("offset", result.offset, (n_groups,), device)
        if result.table is not None:
            self._require_tensor("table", result.table, table_sizes(self.scheme.nbits, result.taps), device)
        return result

    def _require_trellis(self, result: QuantizedRows) -> None:
        taps: object = result.taps
        pair = isinstance(taps, tuple) and len(taps) == 2 and all(type(tap) is int for tap in taps)
        if not pair or not all(0 < tap < 2 << MOST_MEMORY for tap in cast("tuple[int, int]", taps)):
            raise self._broken(f"taps is {taps!r} instead of two whole numbers from 1 to {(2 << MOST_MEMORY) - 1}")
        if result.table is None:
            raise self._broken("QuantizedRows needs a table with its taps")
        if self.scheme.nbits not in TRELLIS_WIDTHS:
            widths = listing(TRELLIS_WIDTHS)
            raise self._broken(f"a trellis has codes of {widths} bits, and nbits={self.scheme.nbits}")

    def require_finite(self, rows: QuantizedRows) -> None:
        """Raise BackendContractError unless scales, offsets and table are finite, and the table has several values."""
        for name, tensor in (("scale", rows.scale), ("offset", rows.offset), ("table", rows.table)):
            if tensor is not None and tensor.numel():
                low, high = torch.aminmax(tensor.to(self.wide_dtype))
                if not bool(low.isfinite() & high.isfinite()):
                    raise self._broken(f"{name} holds NaN or infinity, or leaves the range of {self.wide_dtype}")
        if rows.table is not None and rows.table.min() == rows.table.max():
            raise self._broken("table holds one value only")

    def require_codes_in_range(self, rows: QuantizedRows) -> None:
        """Raise BackendContractError unless every code is below ``2**nbits``."""
        levels = 2**self.scheme.nbits
        if levels < 256 and rows.codes.numel() and (top := int(rows.codes.max())) >= levels:
            raise self._broken(f"code {top} is out of range for nbits={self.scheme.nbits}; the largest is {levels - 1}")

    def opaque(self, result: object) -> Opaque:
        """Return what `quantize` returned, once it has proved to be `Opaque` and to hold tensors.

        Raises:
            BackendContractError: it is not.
        """
        if not isinstance(result, Opaque):
            raise self._broken(f"quantize returned {type(result).__name__} where its only format is opaque")
        for name, tensor in result.tensors.items():
            if not isinstance(tensor, Tensor):
                raise self._broken(f"Opaque.tensors[{name!r}] is {type(tensor).__name__} instead of a tensor")
        return result

    def read(self, values: object, n_groups: int) -> Tensor:
        """Return what `dequantize` returned for `n_groups` rows, once its shape has proved right.

        Raises:
            BackendContractError: it is no tensor, or of another shape.
        """
        expected = (n_groups, self.scheme.group_size)
        if not isinstance(values, Tensor) or tuple(values.shape) != expected:
            shown = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise self._broken(f"dequantize returned {shown} instead of a tensor of shape {list(expected)}")
        if not values.is_floating_point():
            raise self._broken(f"dequantize returned {values.dtype} instead of a floating type")
        return values

    def _require_tensor(
        self, name: str, tensor: object, shape: tuple[int, ...], device: torch.device, *, floating: bool = True
    ) -> None:
        if not isinstance(tensor, Tensor):
            raise self._broken(f"{name} is {type(tensor).__name__} instead of a tensor")
        if tuple(tensor.shape) != shape:
            raise self._broken(f"{name} has shape {list(tensor.shape)} instead of {list(shape)}")
        if tensor.device != device:
            raise self._broken(f"{name} is on {tensor.device} instead of {device}")
        if floating and not tensor.is_floating_point():
            raise self._broken(f"{name} has dtype {tensor.dtype} instead of a floating type")
        if not floating and tensor.dtype != torch.uint8:
            raise self._broken(f"{name} has dtype {tensor.dtype} instead of torch.uint8")

    def _broken(self, problem: str) -> BackendContractError:
        return BackendContractError(self.backend, problem)

"""The backend under test: which combinations to try, and how to look at what it returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from kvquant import registry
from kvquant.engine.border import Border
from kvquant.engine.state import dtype_name
from kvquant.engine.trellis import Taps, level_indices
from kvquant.plugin.quantizer import Opaque, OpaqueQuantizer, QuantizedRows, Quantizer
from kvquant.plugin.spec import Axis, Scheme
from kvquant.registry import Backend, TransformPlugin
from kvquant.registry.found import IN_PROCESS

#: Group sizes tried where a backend takes any: small and odd, the usual ones, and what fits heads of 80, 96 and 112.
_ANY_SIZE = (7, 32, 40, 48, 56, 64, 80, 96, 112, 128, 256)

#: Group sizes tried of those that a backend lists: as many around the usual one, the smallest and the largest.
_MOST_SIZES = len(_ANY_SIZE)

_USUAL_SIZE = 64


@dataclass(frozen=True)
class Case:
    """One combination that the backend says it can do.

    Attributes:
        backend: the backend.
        scheme: bits, axis, group size and options.
        dtype: floating type of the rows.
        device: where they are.
    """

    backend: Backend
    scheme: Scheme
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        scheme = self.scheme
        place = "" if self.device == "cpu" else f" on {self.device}"
        return (
            f"nbits={scheme.nbits}, axis={scheme.axis}, group_size={scheme.group_size}, {dtype_name(self.dtype)}{place}"
        )

    @property
    def key(self) -> tuple[int, Axis, int, torch.dtype, str]:
        """What makes the case, hashable."""
        return self.scheme.nbits, self.scheme.axis, self.scheme.group_size, self.dtype, self.device

    @property
    def border(self) -> Border:
        """The core's own checks of what comes back."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return Border(self.backend.name, self.scheme, self.backend.capabilities.formats, wide)

    def quantizer(self) -> Quantizer:
        """Make a new quantizer."""
        return self.backend.create(self.scheme)

    def rows(self, values: Tensor) -> Tensor:
        """Return `values` as the rows of this case: a contiguous copy in its type and on its device."""
        limit = torch.finfo(self.dtype).max
        return values.double().clamp(-limit, limit).to(self.device, self.dtype, copy=True).contiguous()

    def quantize(self, rows: Tensor, quantizer: Quantizer | None = None) -> Result:
        """Quantise a copy of `rows` with `quantizer`, or a new one; the core looks at shapes, types and devices.

        A copy, so that a backend which writes into its input fails over that and not over everything.

        Raises:
            BackendContractError: they are not as the contract says.
        """
        made = quantizer or self.quantizer()
        return self.result(made.quantize(rows.clone()), rows, made)

    def result(self, result: object, rows: Tensor, made: Quantizer) -> Result:
        """Return what `made` returned for `rows`, once the core has looked at it."""
        if self.border.is_opaque:
            packed = self.border.opaque(result)
            return Result(self.border, packed, len(rows), cast("OpaqueQuantizer", made))
        return Result(self.border, self.border.shaped(result, len(rows), rows.device), len(rows))


@dataclass(frozen=True, eq=False)
class Result:
    """What came back for some rows.

    Attributes:
        border: the core's checks of it.
        raw: as the backend returned it.
        n_groups: number of rows.
        reader: what reads it, for the opaque format.
    """

    border: Border
    raw: QuantizedRows | Opaque
    n_groups: int
    reader: OpaqueQuantizer | None = None

    def read(self) -> Tensor:
        """Return the numbers that it stands for, float64 ``[n_groups, group_size]``."""
        if isinstance(self.raw, Opaque):
            reader = cast("OpaqueQuantizer", self.reader)
            return self.border.read(reader.dequantize(self.raw), self.n_groups).detach().double()
        rows = self.raw
        scale, codes = rows.scale.detach().double()[:, None], rows.codes
        if rows.taps is not None:
            codes = level_indices(codes, Taps(*rows.taps), 1)
        numbers = codes.double() if rows.table is None else rows.table.detach().double()[codes.long()]
        return numbers * scale if rows.offset is None else numbers * scale + rows.offset.detach().double()[:, None]

    def parts(self) -> dict[str, Tensor]:
        """Return what there is of each row, each ``[n_groups, ...]``; of the opaque format the numbers it stands for.

        They are copies: what a quantizer does to its own tensors later does not reach them.
        """
        if isinstance(self.raw, Opaque):
            return {"dequantised numbers": self.read().clone()}
        return {name: part for name, part in self.copied().items() if name != "table"}

    def copied(self) -> dict[str, Tensor]:
        """Return copies of all tensors of the result, as the backend returned them."""
        if isinstance(self.raw, Opaque):
            return {name: tensor.clone() for name, tensor in self.raw.tensors.items()}
        named = {name: getattr(self.raw, name) for name in ("codes", "scale", "offset", "table")}
        return {name: part.clone() for name, part in named.items() if part is not None}

    def whole(self) -> dict[str, Tensor]:
        """Return all that must be the same where results are: `parts`, and the table."""
        table = self.table()
        return self.parts() if table is None else {**self.parts(), "table": table.clone()}

    def table(self) -> Tensor | None:
        """Return the table of the codebook and trellis formats."""
        return self.raw.table if isinstance(self.raw, QuantizedRows) else None


@dataclass
class Subject:
    """A backend under test.

    Attributes:
        backend: the backend; usable, with a declaration.
        nbits: widths to try.
        options: the backend's options to try it with.
    """

    backend: Backend
    nbits: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    _unsound: set[object] = field(default_factory=set)

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices that are declared and that this machine has."""
        return tuple(device for device in self.backend.capabilities.devices if has_device(device))

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Floating types that are declared, float32 first."""
        declared = [getattr(torch, name) for name in self.backend.capabilities.dtypes]
        return tuple(sorted(declared, key=lambda dtype: dtype != torch.float32))

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Group sizes to try, the most usual first."""
        sizes = sorted(self.backend.capabilities.group_sizes or _ANY_SIZE, key=lambda size: abs(size - _USUAL_SIZE))
        return tuple(dict.fromkeys([*sizes[:_MOST_SIZES], min(sizes), max(sizes)]))

    def cases(self, per: str) -> list[Case]:
        """Return the combinations to try.

        Args:
            per: all bits and axes, with ``"combination"``: all group sizes and types; ``"size"``: all group sizes;
                ``"width"``: the usual and the smallest group size; ``"dtype"``: all types at the usual group size;
                ``"usual"``: the usual group size.
        """
        axes, usual, main = self.backend.capabilities.axes, self.group_sizes[0], self.dtypes[0]
        sizes, types = {
            "combination": (self.group_sizes, self.dtypes),
            "size": (self.group_sizes, (main,)),
            "width": ((usual, min(self.group_sizes)), (main,)),
            "dtype": ((usual,), self.dtypes),
            "usual": ((usual,), (main,)),
        }[per]
        grid = product(self.nbits, axes, sizes, types)
        cases = [
            Case(self.backend, Scheme(nbits, cast("Axis", axis), size, self.options), dtype, device)
            for device in self.devices
            for nbits, axis, size, dtype in dict.fromkeys(grid)
        ]
        return [case for case in cases if case.key not in self._unsound]

    def leave_out(self, cases: Iterable[Case]) -> None:
        """Leave these cases out from now on."""
        self._unsound.update(case.key for case in cases)


@contextmanager
def known_name(found: Backend | TransformPlugin) -> Iterator[str]:
    """Yield the name by which a cache finds a plugin, registering one that is but a declaration for that time."""
    if found.distribution != IN_PROCESS or found.spec is None:
        yield found.qualified_name
        return
    is_backend = isinstance(found, Backend)
    every: Iterable[Backend | TransformPlugin] = registry.list_backends() if is_backend else registry.list_transforms()
    known = {other.name: other.spec for other in every if other.distribution == IN_PROCESS}
    before = known.get(found.name)
    if before is found.spec:
        yield found.qualified_name
        return
    registry.register(found.spec, replace=True)
    try:
        yield found.qualified_name
    finally:
        registry.unregister(found.name, kind="backend" if is_backend else "transform")
        if before is not None:
            registry.register(before, replace=True)


def has_device(device: str) -> bool:
    """Whether this machine can hold a tensor on `device`."""
    try:
        return torch.zeros(1, device=device).device.type == device
    except (RuntimeError, AssertionError, NotImplementedError):  # torch's ways to say no, by device
        return False

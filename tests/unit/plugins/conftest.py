"""What the tests of the built-in backends share: making a quantizer, reading its rows, and rows that are hard."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from kvquant.engine.trellis import Taps, level_indices
from kvquant.plugin import QuantizedRows, Quantizer, Scheme

_HUGE = torch.finfo(torch.float32).max

#: Rows of 64 that have gone wrong somewhere; float32. Those above float16's range are cut off at it for float16.
HARD_ROWS: dict[str, Tensor] = {
    "zeros": torch.zeros(3, 64),
    "constant": torch.tensor([[3.3], [-0.1], [65504.0], [-7e-5]]).expand(4, 64).contiguous(),
    "one huge outlier": torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).index_fill(
        1, torch.tensor([17]), 65504.0
    ),
    "only an outlier": torch.zeros(2, 64).index_fill(1, torch.tensor([63]), -30000.0),
    "float16 limits": torch.linspace(-65504, 65504, 128).reshape(2, 64),
    "both ends of float16": torch.tensor([65504.0, -65504.0]).repeat(2, 32),
    "tiny": torch.randn(3, 64, generator=torch.Generator().manual_seed(2)) * 1e-30,
    "small": torch.randn(3, 64, generator=torch.Generator().manual_seed(3)) * 1e-4,
    "subnormal": torch.randn(3, 64, generator=torch.Generator().manual_seed(4)) * 1e-42,
    "far from zero": torch.randn(3, 64, generator=torch.Generator().manual_seed(5)) * 0.1 + 1000,
    "large": torch.randn(3, 64, generator=torch.Generator().manual_seed(6)) * 1e30,
}

#: Wider than float32's range: no finite scale is right, but what comes back must be finite.
WIDEST_ROWS = torch.tensor([[_HUGE, -_HUGE] * 32, [_HUGE] * 63 + [-_HUGE], [_HUGE, 0.0] * 32])


def as_dtype(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 rows in `dtype`, cut off at its limits."""
    limits = torch.finfo(dtype)
    return rows.clamp(max(limits.min, -_HUGE), min(limits.max, _HUGE)).to(dtype)


def quantizer(backend: str, nbits: int, group_size: int = 64, **options: Any) -> Quantizer:
    """Make a quantizer the way the core does, from the factory in the backend's spec."""
    (spec,) = importlib.import_module(f"kvquant_plugins.{backend}").kvquant_register_backends()
    module, _, name = spec.factory.partition(":")
    made = getattr(importlib.import_module(module), name)(Scheme(nbits, "token", group_size, options))
    assert isinstance(made, Quantizer)
    return made


def read(rows: QuantizedRows) -> Tensor:
    """Dequantise as the core does, in the type of the scale."""
    scale, codes = rows.scale[:, None], rows.codes
    if rows.taps is not None:
        codes = level_indices(codes, Taps(*rows.taps), 1)
    numbers = codes.to(scale.dtype) if rows.table is None else rows.table[codes.long()]
    return numbers * scale if rows.offset is None else numbers * scale + rows.offset[:, None]


@pytest.fixture
def random_rows() -> Tensor:
    """Rows with outliers: float32 ``[300, 64]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 64, generator=generator) * torch.randn(300, 64, generator=generator).mul(0.5).exp()

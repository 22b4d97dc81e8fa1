"""How well rows come back: ordinary ones beside what theory allows, hard ones at all."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from kvquant.plugin.quantizer import QuantizedRows
from kvquant.testing import data
from kvquant.testing.check import check, require
from kvquant.testing.outcomes import NotApplicable
from kvquant.testing.subject import Case

#: Error beside that of nearest levels: plain rounding has 1, stochastic rounding 1.41, cutting off 2.
_NEAREST_LIMIT = 1.5

#: Error beside theory's (an even grid, or the best scale for a table): 2 is a bit less than promised.
_THEORY_LIMIT = 2.0

#: Rows shorter than this have too few numbers for their error to be near what theory expects.
_SHORTEST = 16


@check("nearest-level", "size")
def nearest_level(case: Case) -> None:
    """Codes stand for the level nearest to each number, or nearly so."""
    if case.border.is_opaque:
        raise NotApplicable("the levels of an opaque format are not known")
    if case.scheme.group_size < _SHORTEST:
        raise NotApplicable(f"not measured on groups below {_SHORTEST}")
    rows = case.rows(data.spread(64, case.scheme.group_size))
    result = case.quantize(rows)
    numbers, read, parts = rows.double(), result.read(), cast("QuantizedRows", result.raw)
    if parts.taps is not None:
        raise NotApplicable("codes of a trellis depend on one another")
    scale = parts.scale.detach().double()
    if parts.table is None:
        offset, step = cast("Tensor", parts.offset).detach().double()[:, None], scale.where(scale != 0, 1)[:, None]
        codes = ((numbers - offset) / step).round().clamp(0, 2**case.scheme.nbits - 1)
        best = codes * scale[:, None] + offset
    else:
        best = data.nearest_in_table(numbers, parts.table.double(), scale)
    width = numbers.abs().amax(dim=1)[:, None]
    found, ideal = ((data.rms((states - numbers) / width) ** 2).mean().sqrt() for states in (read, best))
    rounding = 4 * torch.finfo(torch.float32).eps  # of scale and offset, at the size of the row
    require(
        float(found) <= _NEAREST_LIMIT * float(ideal) + rounding,
        f"the error is {float(found) / max(float(ideal), rounding):.2f} times that of the nearest levels; "
        f"at most {_NEAREST_LIMIT} is allowed",
    )


@check("error-bound", "size")
def error_bound(case: Case) -> None:
    """The error is that of the bits: near an even grid's, or near the best that the table can do."""
    nbits, size = case.scheme.nbits, case.scheme.group_size
    if size < _SHORTEST:
        raise NotApplicable(f"not measured on groups below {_SHORTEST}")
    for values in (data.spread(64, size), data.shifted(64, size), -data.shifted(64, size)):
        rows = case.rows(values)
        result = case.quantize(rows)
        numbers, read, table = rows.double(), result.read(), result.table()
        require_finite(read, rows)
        due, what = data.even_grid_error(numbers, nbits), f"an even grid of {nbits} bits"
        if table is not None:
            # Tables need not be even: those shaped like floating point give up precision at the top for range below.
            best, what = data.best_scale_error(numbers, table.detach().double()), f"{what} or this table"
            due = torch.maximum(due, best)
            coarse = data.error_ratio(numbers, read, data.even_grid_error(numbers, -(-nbits // 2)))
            _require_ratio(coarse, "an even grid of half the bits")
        _require_ratio(data.error_ratio(numbers, read, due), what)


@check("constant", "width")
def constant(case: Case) -> None:
    """Constant rows come back within a step, and finite."""
    for start in (data.constants(), data.constants()[:1]):
        rows = case.rows(start.expand(-1, case.scheme.group_size))
        _require_within_a_step(case, rows)


@check("zeros", "width")
def zeros(case: Case) -> None:
    """Rows of zeros come back as zeros, alone and among others."""
    size = case.scheme.group_size
    mixed = data.gaussian(6, size)
    mixed[::2] = 0
    for values in (torch.zeros(3, size), mixed):
        rows = case.rows(values)
        read = case.quantize(rows).read()
        require_finite(read, rows)
        zero = (rows == 0).all(dim=1)
        found = float(read[zero].abs().max())
        require(found <= 1e-6, f"zeros came back as numbers up to {found:.3g}")


@check("outliers", "width")
def outliers(case: Case) -> None:
    """A row with one number a hundred times larger comes back finite, and better than as zeros."""
    rows = case.rows(data.one_outlier(16, case.scheme.group_size))
    read = case.quantize(rows).read()
    require_finite(read, rows)
    numbers = rows.double()
    allowed = torch.maximum(data.step(numbers, case.scheme.nbits), data.rms(numbers))
    worst = float((data.rms(read - numbers) / allowed).max())
    require(worst <= 1, f"the error is {worst:.2f} times the larger of one step and of storing zeros")


@check("tiny", "width")
def tiny(case: Case) -> None:
    """Tiny numbers come back as well as ordinary ones, and the tiniest at least as nothing larger."""
    floor = torch.finfo(case.dtype).smallest_normal
    for factor in (1e-2, 1e-4, 1e-6):
        if factor > 100 * floor:
            _require_as_good_as_at_unit_scale(case, factor)
    for factor in (1e-7, 1e-20, 1e-30, 1e-38, 1e-42):
        rows = case.rows(data.gaussian(8, case.scheme.group_size) * factor)
        read = case.quantize(rows).read()
        require_finite(read, rows)
        allowed = 3 * rows.double().abs().amax() + 1e-37
        require(read.abs().amax() <= allowed, f"numbers around {factor:g} came back as {float(read.abs().amax()):.3g}")


@check("huge", "width")
def huge(case: Case) -> None:
    """Huge numbers come back as well as ordinary ones, and the largest of float32 at least finite."""
    limit = torch.finfo(case.dtype).max
    for factor in (1e2, 1e4, 1e6, 1e12):
        if factor < limit / 100:
            _require_as_good_as_at_unit_scale(case, factor)
    size = case.scheme.group_size
    for top in {min(1e30, limit), min(3.4e38, limit)}:
        values = data.gaussian(6, size).clamp(-1, 1)
        values[0], values[1], values[2] = 1, -1, torch.where(torch.arange(size) % 2 == 0, 1.0, -1.0)
        rows = case.rows(values * top)
        require_finite(case.quantize(rows).read(), rows)


@check("half-precision", "dtype")
def half_precision(case: Case) -> None:
    """Rows in each declared type come back as well as the same numbers in float32, up to float16's limits."""
    size = case.scheme.group_size
    top = min(torch.finfo(case.dtype).max, 60000.0)
    alternating = torch.where(torch.arange(size) % 3 == 0, top, -top).expand(4, -1)
    for values in (data.gaussian(32, size), data.gaussian(32, size).clamp(-4, 4) * (top / 4), alternating):
        rows = case.rows(values)
        read = case.quantize(rows).read()
        require_finite(read, rows)
        numbers = rows.double()
        if "float32" not in case.backend.capabilities.dtypes:
            due = data.even_grid_error(numbers, -(-case.scheme.nbits // 2))
            _require_ratio(data.error_ratio(numbers, read, due), "an even grid of half the bits")
            continue
        in_float32 = replace(case, dtype=torch.float32)
        same = in_float32.quantize(in_float32.rows(numbers)).read()
        found, ideal = (float((data.rms(states - numbers)).square().mean().sqrt()) for states in (read, same))
        rounding = 4 * torch.finfo(case.dtype).eps * float(numbers.abs().max())
        require(
            found <= _THEORY_LIMIT * ideal + rounding,
            f"numbers up to {float(numbers.abs().max()):g}: the error is {found:.3g}, and {ideal:.3g} for the same "
            "numbers in float32",
        )


def require_finite(read: Tensor, rows: Tensor) -> None:
    """Raise CheckFailed unless every number that came back for `rows` is finite."""
    wrong = int((~read.isfinite()).sum())
    reach = float(rows.double().abs().max())
    require(not wrong, f"{wrong} of {read.numel()} numbers came back as NaN or infinity, of rows up to {reach:.3g}")


def _require_ratio(ratio: float, what: str) -> None:
    limit = f"{_THEORY_LIMIT:.0f} times is allowed"
    require(ratio <= _THEORY_LIMIT, f"the error is {ratio:.2f} times that of {what}; at most {limit}")


def _require_within_a_step(case: Case, rows: Tensor) -> None:
    """A row's root mean square error; not each number's, because a rotation spreads errors unevenly."""
    numbers = rows.double()
    read = case.quantize(rows).read()
    require_finite(read, rows)
    excess = data.rms(read - numbers) / data.step(numbers, case.scheme.nbits)
    worst = int(excess.argmax())
    require(
        float(excess[worst]) <= 1.001,
        f"a row between {float(numbers[worst].min()):g} and {float(numbers[worst].max()):g} came back off by "
        f"{float(excess[worst]):.3g} steps of an even grid; at most 1 is allowed",
    )


def _require_as_good_as_at_unit_scale(case: Case, factor: float) -> None:
    values = data.gaussian(32, case.scheme.group_size)
    errors = []
    for scaled in (1.0, factor):
        rows = case.rows(values * scaled)
        read = case.quantize(rows).read()
        require_finite(read, rows)
        numbers = rows.double()
        errors.append(float((data.rms(read - numbers) / numbers.abs().amax(dim=1)).square().mean().sqrt()))
    rounding = 4 * torch.finfo(torch.float32).eps
    require(
        errors[1] <= _THEORY_LIMIT * errors[0] + rounding,
        f"the relative error of numbers around {factor:g} is {errors[1] / max(errors[0], rounding):.3g} times "
        "that of the same numbers around 1",
    )

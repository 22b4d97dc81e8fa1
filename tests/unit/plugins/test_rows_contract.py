"""What every built-in backend owes the core: rows in, canonical rows out, each row on its own."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvquant.plugin import QuantizedRows
from tests.unit.plugins.conftest import HARD_ROWS, WIDEST_ROWS, as_dtype, quantizer, read

BACKENDS = ("reference", "lloydmax", "trellis", "quanto", "hqq", "bitsandbytes")
CASES: list[tuple[str, int, dict[str, Any]]] = [
    *(("reference", nbits, {"scale": scale}) for nbits in (1, 2, 3, 4, 8) for scale in ("range", "error")),
    *(("lloydmax", nbits, {"scale": scale}) for nbits in (1, 2, 3, 4) for scale in ("fit", "norm")),
    *(("quanto", nbits, {"optimizer": optimizer}) for nbits in (2, 4) for optimizer in ("max", "hqq")),
    ("quanto", 8, {"optimizer": "absmax"}),
    *(("quanto", 8, {"qtype": f"qfloat8_{kind}"}) for kind in ("e4m3fn", "e4m3fnuz", "e5m2")),
    *(("hqq", nbits, {"optimize": optimize}) for nbits in (1, 2, 3, 4, 8) for optimize in (True, False)),
    ("bitsandbytes", 4, {"quant_type": "nf4"}),
    ("bitsandbytes", 4, {"quant_type": "fp4"}),
    ("bitsandbytes", 8, {}),
    *(("trellis", nbits, {"offset": True}) for nbits in (1, 2, 3)),
    ("trellis", 2, {"offset": True, "states": 64}),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_case = pytest.mark.parametrize(("backend", "nbits", "options"), CASES)
#: Without those whose scale is the norm of normal numbers, whatever the row: a constant row lies between two levels.
fitting_case = pytest.mark.parametrize(
    ("backend", "nbits", "options"), [case for case in CASES if case[2] != {"scale": "norm"}]
)


def check(rows: QuantizedRows, n_groups: int, group_size: int, nbits: int) -> None:
    assert rows.codes.dtype == torch.uint8
    assert rows.codes.shape == (n_groups, group_size)
    assert n_groups == 0 or int(rows.codes.max()) < 2**nbits
    assert rows.scale.dtype == torch.float32
    assert rows.scale.shape == (n_groups,)
    assert rows.scale.isfinite().all()
    if rows.offset is not None:
        assert (rows.table is None) == (rows.taps is None)
        assert rows.offset.dtype == torch.float32
        assert rows.offset.shape == (n_groups,)
        assert rows.offset.isfinite().all()
    if rows.table is None:
        assert rows.offset is not None
    else:
        assert rows.table.shape == (2**nbits if rows.taps is None else 2 ** (nbits + 1),)
        assert rows.table.isfinite().all()


def assert_same(one: QuantizedRows, other: QuantizedRows) -> None:
    """Bit for bit."""
    for name in ("codes", "scale", "offset", "table"):
        mine, yours = getattr(one, name), getattr(other, name)
        assert (mine is None) == (yours is None), name
        assert mine is None or torch.equal(mine, yours), name


@fitting_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_rows_come_back_finite_and_right(
    backend: str, nbits: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Constant, zeros, outliers, limits of float16, tiny: no number moves by more than its row is wide."""
    made = quantizer(backend, nbits, **options)
    for name, float32_rows in HARD_ROWS.items():
        rows = as_dtype(float32_rows, dtype)
        result = made.quantize(rows)
        check(result, len(rows), 64, nbits)
        numbers = rows.double()
        # A symmetric backend spreads its levels over [-absmax, absmax]; two levels miss a row's edge by its width.
        reach = torch.maximum(numbers.amax(1) - numbers.amin(1), numbers.abs().amax(1) / 2)
        allowed = reach * 1.001 + numbers.abs().amax(1) * 1e-6 + 1e-35
        assert ((read(result).double() - numbers).abs().amax(1) <= allowed).all(), name


@fitting_case
def test_a_constant_row_comes_back_as_it_was(backend: str, nbits: int, options: dict[str, Any]) -> None:
    """To rounding, at every width."""
    rows = HARD_ROWS["constant"]
    torch.testing.assert_close(read(quantizer(backend, nbits, **options).quantize(rows)), rows, rtol=8e-3, atol=0)
    zeros = HARD_ROWS["zeros"]
    assert torch.equal(read(quantizer(backend, nbits, **options).quantize(zeros)), zeros)


@every_case
def test_rows_wider_than_float32_come_back_finite(backend: str, nbits: int, options: dict[str, Any]) -> None:
    """No scale is right for them, but nothing becomes infinite."""
    result = quantizer(backend, nbits, **options).quantize(WIDEST_ROWS)
    check(result, len(WIDEST_ROWS), 64, nbits)
    assert read(result).isfinite().all()


@every_case
@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32),
    group_size=st.sampled_from((8, 16, 20, 31, 32, 64, 128, 256)),
    sizes=st.lists(st.sampled_from((0, 1, 2, 3, 7, 33, 100)), max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_any_split_gives_the_same_bits(
    backend: str,
    nbits: int,
    options: dict[str, Any],
    seed: int,
    group_size: int,
    sizes: list[int],
    dtype: torch.dtype,
) -> None:
    """A row's codes and scales do not depend on its neighbours, on the split, or on where in a call it stands."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(400, 1, generator=generator).exp()
    rows = (torch.randn(400, group_size, generator=generator) * spread).to(dtype)
    rows[11] = 65504  # a neighbour that is constant and one with an outlier change nothing either
    rows[12, 0] = 60000
    kept = rows.clone()
    made = quantizer(backend, nbits, group_size, **options)
    whole = made.quantize(rows)
    check(whole, 400, group_size, nbits)
    assert torch.equal(rows, kept), "rows were modified"
    assert_same(whole, made.quantize(rows))

    parts = [made.quantize(part) for part in rows.split([*sizes, 400 - sum(sizes)])]
    joined = QuantizedRows(
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        offset=None if whole.offset is None else torch.cat([part.offset for part in parts]),
        table=whole.table,
    )
    assert_same(whole, joined)

    order = torch.randperm(400, generator=generator)
    mixed = quantizer(backend, nbits, group_size, **options).quantize(rows[order])
    assert torch.equal(mixed.codes, whole.codes[order])
    assert torch.equal(mixed.scale, whole.scale[order])


@every_case
def test_many_rows_on_any_number_of_threads(backend: str, nbits: int, options: dict[str, Any]) -> None:
    """More rows than a backend works on at once, on one thread and on three, and some of them alone."""
    rows = torch.randn(7001, 40, generator=torch.Generator().manual_seed(9))
    made = quantizer(backend, nbits, 40, **options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        many = made.quantize(rows)
        torch.set_num_threads(1)
        assert_same(many, made.quantize(rows))
        for index in (0, 3500, 7000):
            alone = made.quantize(rows[index : index + 1])
            assert torch.equal(alone.codes[0], many.codes[index])
            assert torch.equal(alone.scale[0], many.scale[index])
    finally:
        torch.set_num_threads(threads)


@every_case
def test_no_rows(backend: str, nbits: int, options: dict[str, Any]) -> None:
    """Nothing in, nothing out, in the right shapes."""
    check(quantizer(backend, nbits, **options).quantize(torch.zeros(0, 64)), 0, 64, nbits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_spec_is_what_the_entry_point_says(backend: str) -> None:
    """One spec under the entry point's name; a backend that needs a library says how to get it."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert project["entry-points"]["kvquant.backends"][backend] == f"kvquant_plugins.{backend}"
    (spec,) = importlib.import_module(f"kvquant_plugins.{backend}").kvquant_register_backends()
    assert spec.name == backend
    assert spec.summary
    assert spec.url.startswith("https://")
    assert (spec.install_hint == f"pip install 'kvquant[{backend}]'") == bool(spec.requires)
    assert all(requirement.minimum for requirement in spec.requires)
    cases = {nbits for name, nbits, _ in CASES if name == backend}
    assert cases == set(spec.capabilities.nbits), "this file tests every width that is declared"
    options = {option for name, _, chosen in CASES if name == backend for option in chosen}
    assert options == set(spec.capabilities.options), "and every option"


def test_listing_imports_neither_torch_nor_a_library() -> None:
    """Declaring the backends costs milliseconds."""
    code = (
        "import importlib, sys\n"
        f"for name in {BACKENDS!r}:\n"
        "    importlib.import_module('kvquant_plugins.' + name).kvquant_register_backends()\n"
        "print(*({'torch', 'transformers', 'hqq', 'optimum', 'bitsandbytes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_backends_say_nothing_to_users() -> None:
    """Importing the libraries and quantising prints no line and shows no warning."""
    code = (
        "import importlib, torch\n"
        "from kvquant.plugin import Scheme\n"
        f"for name in {BACKENDS!r}:\n"
        "    (spec,) = importlib.import_module('kvquant_plugins.' + name).kvquant_register_backends()\n"
        "    module, _, made = spec.factory.partition(':')\n"
        "    getattr(importlib.import_module(module), made)("
        "Scheme(spec.capabilities.nbits[-1], 'token', 64)).quantize(torch.zeros(2, 64))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")

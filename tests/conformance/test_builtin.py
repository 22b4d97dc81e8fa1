"""The backends that come with kvquant pass the kit, with the real libraries and every value of every option."""

from __future__ import annotations

from typing import Any

import pytest

from kvquant.registry import get_backend
from kvquant.testing import check_backend
from kvquant.testing.checks import CHECKS

pytestmark = pytest.mark.slow

#: Backend, options and the widths that they go with; None for all.
CONFIGURATIONS: tuple[tuple[str, dict[str, Any], tuple[int, ...] | None], ...] = (
    ("reference", {}, None),
    ("reference", {"scale": "error"}, None),
    ("reference", {"scale": "range"}, (1, 2, 3)),  # what it is not by itself
    ("lloydmax", {}, None),
    ("lloydmax", {"scale": "norm"}, None),
    ("hqq", {}, None),
    ("hqq", {"optimize": False}, None),
    ("quanto", {}, None),
    ("quanto", {"optimizer": "hqq"}, (2, 4)),
    ("quanto", {"qtype": "qfloat8_e4m3fn"}, (8,)),
    ("quanto", {"qtype": "qfloat8_e4m3fnuz"}, (8,)),
    ("quanto", {"qtype": "qfloat8_e5m2"}, (8,)),
    ("bitsandbytes", {}, None),
    ("bitsandbytes", {"quant_type": "fp4"}, (4,)),
    ("trellis", {}, None),
    ("trellis", {"offset": True, "states": 16}, (2,)),
)

IMPORTS = ("listing", "requirements", "missing-library")


@pytest.mark.parametrize(("backend", "options", "nbits"), CONFIGURATIONS)
def test_it_passes_the_kit(backend: str, options: dict[str, Any], nbits: tuple[int, ...] | None) -> None:
    """Every check that applies; what it imports is looked at once a backend."""
    names = [check.name for check in CHECKS if not (options and check.name in IMPORTS)]
    check_backend(backend, nbits=nbits, options=options, checks=names).raise_for_failures()


def test_every_option_is_checked() -> None:
    """An option that is added here must be added above."""
    for name in ("reference", "lloydmax", "trellis", "hqq", "quanto", "bitsandbytes"):
        tried = {option for backend, options, _ in CONFIGURATIONS if backend == name for option in options}
        assert tried == set(get_backend(name).capabilities.options)


@pytest.mark.usefixtures("formats")
def test_what_does_not_apply_says_why() -> None:
    """And is not counted as passed."""
    outcomes = {outcome.check: outcome for outcome in check_backend("test-affine", nbits=(4,)).outcomes}
    assert outcomes["options"].status == "not applicable"
    assert outcomes["options"].reason == "the backend has no options"
    assert outcomes["bits"].reason == "the core packs the codes of this format"
    assert outcomes["shapes"].status == "passed"
    assert outcomes["shapes"].cases > 10

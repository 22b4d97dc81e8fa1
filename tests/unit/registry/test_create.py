"""From a backend to a quantizer."""

from __future__ import annotations

import sys

import pytest

import kvquant
from kvquant.errors import BackendContractError, BackendFactoryError, BackendImportError
from kvquant.plugin import Scheme

SCHEME = Scheme(4, "token", 64)
PROBLEMS = {
    "no-module": (
        "kvquant_test_broken_factory_library:Quantizer",
        "ModuleNotFoundError: No module named 'kvquant_test_broken_factory_library'",
    ),
    "no-class": (
        "kvquant_test_broken_factory:Missing",
        "AttributeError: module 'kvquant_test_broken_factory' has no attribute 'Missing'",
    ),
    "late-import": (
        "kvquant_test_broken_factory:late_import",
        "ModuleNotFoundError: No module named 'a_library_that_is_not_there'",
    ),
}


def test_the_factory_is_imported_on_first_use(install):
    """Neither listing nor looking a backend up imports its quantizer."""
    install("good")
    kvquant.list_backends()
    backend = kvquant.get_backend("good")
    assert "kvquant_test_good.quantizer" not in sys.modules
    assert backend.create(SCHEME).scheme is SCHEME
    assert "kvquant_test_good.quantizer" in sys.modules


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_quantizer_that_fails_to_import_says_whose_it_is(install, name):
    """The error names backend, plugin and distribution; the import's own error is its cause."""
    install("broken_factory")
    factory, problem = PROBLEMS[name]
    with pytest.raises(BackendImportError) as caught:
        kvquant.get_backend(name).create(SCHEME)
    assert str(caught.value) == (
        f"backend {name!r}, from kvquant-broken-factory 1.0, cannot be used: importing its quantizer {factory!r} "
        f"failed: {problem}. Next step: upgrade kvquant-broken-factory and what it needs, or report this to its author"
    )
    assert isinstance(caught.value.__cause__, (ImportError, AttributeError))


@pytest.mark.parametrize(
    ("name", "problem"), [("refuses", "ValueError: no way with 4 bits"), ("exits", "SystemExit: 1")]
)
def test_a_factory_that_raises_says_for_what(install, name, problem):
    """The error names what was asked for; the factory's own error is its cause."""
    install("broken_factory")
    with pytest.raises(BackendFactoryError) as caught:
        kvquant.get_backend(name).create(SCHEME)
    assert str(caught.value) == (
        f"backend {name!r}, from kvquant-broken-factory 1.0, could not make a quantizer for {SCHEME}: {problem}"
    )
    assert caught.value.scheme is SCHEME
    assert type(caught.value.__cause__).__name__ == problem.partition(":")[0]


@pytest.mark.parametrize(
    ("name", "kind", "methods"),
    [("no-quantizer", "object", "quantize"), ("no-dequantize", "Something", "quantize and dequantize")],
)
def test_a_factory_that_makes_no_quantizer_breaks_the_contract(install, name, kind, methods):
    """An opaque format needs `dequantize`, too."""
    install("broken_factory")
    with pytest.raises(BackendContractError, match=f"its factory returned a {kind} without the methods {methods};?"):
        kvquant.get_backend(name).create(SCHEME)

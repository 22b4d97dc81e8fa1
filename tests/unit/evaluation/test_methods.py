"""Ways to quantise: how they are written and found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kvquant
from kvquant.errors import (
    BackendFactoryError,
    KVQuantError,
    OptionValueError,
    UnknownBackendError,
    UnsupportedError,
)
from kvquant.evaluation.methods import Method, find_methods
from kvquant.plugin import BackendSpec, Capabilities
from tests.plugins.on_path import plugins_on_path
from tests.support import MinMax


@pytest.fixture
def choosy() -> Iterator[Callable[..., None]]:
    """Register a backend of the name ``choosy`` with some capabilities."""

    def register(**capabilities: Any) -> None:
        kvquant.register(BackendSpec("choosy", MinMax, Capabilities(**{"nbits": (2, 4), **capabilities})))

    yield register
    kvquant.unregister("choosy")


def test_every_usable_backend_with_all_that_it_declares() -> None:
    """The yardstick first, in order of bits."""
    methods, left_out = find_methods()
    assert left_out == {}
    assert [method for method in methods if method.backend == "quanto"] == [
        Method("quanto", nbits, axis) for nbits in (2, 4, 8) for axis in ("channel", "token")
    ]
    assert methods[0] == Method("reference", 1, "channel")
    assert {method.backend for method in methods} >= {"reference", "lloydmax", "hqq", "quanto", "bitsandbytes"}


def test_a_backend_that_cannot_be_used_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it was asked for by name."""
    monkeypatch.setenv("KVQUANT_BLOCK_BACKENDS", "hqq")
    methods, left_out = find_methods()
    assert "hqq" not in {method.backend for method in methods}
    assert left_out == {"kvquant:hqq": "the environment's KVQUANT_BLOCK_BACKENDS='hqq' names it"}
    with pytest.raises(ImportError, match="KVQUANT_BLOCK_BACKENDS"):
        find_methods("hqq:4")


@pytest.mark.parametrize(
    ("capabilities", "says"),
    [
        ({"group_sizes": (32, 128)}, "group_size=64 is not supported; supported: 32, 128"),
        ({"devices": ("cuda",)}, "device='cpu' is not supported; supported: cuda"),
        ({"dtypes": ("float16",)}, "dtype='float32' is not supported; supported: float16"),
    ],
)
def test_what_a_backend_does_not_declare_is_left_out_and_said(
    choosy: Callable[..., None], capabilities: dict[str, Any], says: str
) -> None:
    """Without a name it stands under the table; with one it is refused."""
    choosy(**capabilities)
    methods, left_out = find_methods()
    assert "choosy" not in {method.backend for method in methods}
    assert left_out == {"in-process:choosy": says}
    with pytest.raises(UnsupportedError) as caught:
        find_methods("choosy")
    assert says in str(caught.value)


def test_axes_that_a_backend_does_not_declare_are_left_out(choosy: Callable[..., None]) -> None:
    """There is no line for them."""
    choosy(axes=("token",))
    assert find_methods("choosy")[0] == (Method("choosy", 2, "token"), Method("choosy", 4, "token"))


def test_where_no_backend_can_be_used_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is named with its reason."""
    monkeypatch.setenv("KVQUANT_LOAD_BACKENDS", "nothing")
    with pytest.raises(UnsupportedError) as caught:
        find_methods()
    for name in ("reference", "lloydmax", "trellis", "hqq", "quanto", "bitsandbytes"):
        assert f"kvquant:{name}: the environment's KVQUANT_LOAD_BACKENDS" in str(caught.value)


def test_methods_are_written_short_or_in_full() -> None:
    """What is left open stands for all that is declared."""
    assert find_methods("kvquant:hqq:2:token:optimize=false")[0] == (Method("hqq", 2, "token", (("optimize", False),)),)
    assert len(find_methods("bitsandbytes")[0]) == 4
    assert [method.axis for method in find_methods(" hqq : 4 , hqq:8:token")[0]] == ["channel", "token", "token"]
    assert find_methods("HQQ:4:token")[0] == (Method("hqq", 4, "token"),)
    assert find_methods("hqq:2.5:token")[0] == (Method("hqq", 2.5, "token"),)


def test_the_rest_of_the_command_line_narrows_what_is_written() -> None:
    """Backends that lack a width go without a line, if another has it."""
    narrowed, _ = find_methods("reference,quanto", nbits=[3, 4], axes=["token"])
    assert [(method.backend, method.nbits) for method in narrowed] == [
        ("reference", 3),
        ("reference", 4),
        ("quanto", 4),
    ]


def test_what_a_method_is_called_can_be_asked_for_again() -> None:
    """In full, with its options."""
    method = Method("bitsandbytes", 4, "token", (("quant_type", "fp4"),))
    assert method.label == "bitsandbytes quant_type=fp4"
    assert find_methods(method.text)[0] == (method,)


def test_two_backends_of_one_name_are_told_apart() -> None:
    """By their distributions; neither is chosen by chance."""
    with plugins_on_path("duplicate_a", "duplicate_b"):
        methods, left_out = find_methods()
        (name,) = {backend.name for backend in kvquant.list_backends() if backend.availability.status == "duplicate"}
        assert name not in {method.backend for method in methods}
        assert len(left_out) == 2
        with pytest.raises(ImportError, match="2 distributions"):
            find_methods(f"{name}:4")
        one, other = (find_methods(qualified)[0] for qualified in left_out)
        assert [method.backend for method in (one[0], other[0])] == list(left_out)
        assert one[0].cache(64).layers is not None


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("refrence", UnknownBackendError, "unknown backend 'refrence'. Did you mean 'reference'"),
        ("refrence:4", UnknownBackendError, "unknown backend 'refrence'. Did you mean 'reference'"),
        ("kvquant:hqqq:4", UnknownBackendError, "unknown backend 'kvquant:hqqq'"),
        ("quanto:3", UnsupportedError, "nbits=3 is not supported; supported: 2, 4, 8"),
        ("quanto:2.5", UnsupportedError, "nbits=2.5 is a mix of 3 and 2 bits; supported: 2, 4, 8"),
        ("quanto:4:fast=true", UnsupportedError, "option 'fast' is unknown to this backend; known: optimizer, qtype"),
        ("hqq:4:chanel", OptionValueError, "backends='hqq:4:chanel' cannot work: expected BACKEND[:NBITS][:AXIS]"),
        ("hqq:chanel", OptionValueError, "backends='hqq:chanel' cannot work: expected BACKEND[:NBITS][:AXIS]"),
        ("hqq:=4", OptionValueError, "expected BACKEND[:NBITS][:AXIS][:OPTION=VALUE]"),
        ("", OptionValueError, "expected BACKEND[:NBITS][:AXIS][:OPTION=VALUE]"),
        ("hqq,", OptionValueError, "expected BACKEND[:NBITS][:AXIS][:OPTION=VALUE]"),
        ("hqq:4,hqq:4", OptionValueError, "each method once"),
        ("hqq:4,hqq:4:token", OptionValueError, "each method once"),
    ],
)
def test_a_method_that_cannot_be_is_refused(text: str, error: type[Exception], says: str) -> None:
    """Naming what was written and what would work."""
    with pytest.raises(error) as caught:
        find_methods(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"nbits": [5]}, "nbits=5 cannot work: expected one or more of 1, 2, 3, 4, 8"),
        ({"nbits": [4, 5]}, "nbits=5 cannot work: expected one or more of 1, 2, 3, 4, 8"),
        ({"text": "quanto", "nbits": [3]}, "nbits=3 cannot work: expected one or more of 2, 4, 8"),
        ({"axes": ["row"]}, "axes='row' cannot work: expected one or more of channel, token"),
        ({"text": "hqq:4:channel", "axes": ["token"]}, "axes='token' cannot work: expected one or more of channel"),
        ({"group_size": 0}, "group_size=0 cannot work: expected at least 1"),
        ({"device": "nonsense"}, "device='nonsense' cannot work"),
        ({"device": "meta"}, "device='meta' cannot work: expected a device that this machine has"),
    ],
)
def test_what_none_of_the_methods_has_is_refused(asked: dict[str, Any], says: str) -> None:
    """A line that is not there would be taken for one that was forgotten."""
    with pytest.raises(OptionValueError) as caught:
        find_methods(**asked)
    assert says in str(caught.value)


@pytest.mark.parametrize("value", ["[", "[1]", "{}", "perhaps", "2020-01-01", ""])
def test_a_value_that_means_nothing_is_for_the_backend_to_refuse(value: str) -> None:
    """Whatever was typed, what comes is one of our errors."""
    ((method, *_), _) = find_methods(f"hqq:4:channel:optimize={value}")
    with pytest.raises(BackendFactoryError, match="is not supported; supported: True, False") as caught:
        method.cache(64)
    assert isinstance(caught.value, KVQuantError)

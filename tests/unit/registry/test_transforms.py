"""Transforms are found, declared and refused as backends are."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import kvquant
from kvquant import registry
from kvquant.errors import (
    BackendNotRegisteredError,
    BackendSpecError,
    BlockedTransformError,
    BrokenTransformError,
    DuplicateTransformError,
    HeadDimError,
    IncompatibleTransformError,
    OptionValueError,
    TransformContractError,
    TransformExistsError,
    TransformFactoryError,
    TransformImportError,
    TransformNotRegisteredError,
    TransformSpecError,
    UnknownTransformError,
)
from kvquant.plugin import TransformSpec, hookimpl
from tests.unit.registry.test_register import spec as backend_spec

HOOKS = "kvquant_register_backends, kvquant_transforms"
REASONS = {
    "no-module": "its plugin fails to load: ModuleNotFoundError: No module named 'kvquant_test_not_there'",
    "raises": "its plugin fails to load: RuntimeError: no transforms today",
    "misspelt": f"it has a hook kvquant_transform, which kvquant does not know (it knows {HOOKS})",
    "undecorated": "its hook kvquant_transforms lacks the decorator @kvquant.plugin.hookimpl",
    "signature": "its hook kvquant_transforms does not fit: Argument(s) {'registry'} are declared in the hookimpl but "
    "can not be found in the hookspec",
    "wrong-return": "its hook kvquant_transforms must return a list, and returned a TransformSpec",
    "lists-backend": "its hook kvquant_transforms must list TransformSpecs, and lists a BackendSpec",
    "other-name": "its entry point is named 'other-name', and its hook declares 'another'",
    "bad-spec": "factory='nowhere.Nothing' must be 'module:Class' or a callable; summary=None must be a string",
}


class Same:
    """Changes nothing."""

    def __init__(self, head_dim):
        self.head_dim = head_dim

    def apply(self, states):
        return states

    undo = apply_to_query = apply


class UnspeakableError(ValueError):
    """Fails to say what is wrong."""

    def __str__(self):
        raise RuntimeError


def transform(name="mine", factory=Same, **fields):
    return TransformSpec(name, factory, **fields)


@pytest.fixture
def known():
    """Register transforms that are gone after the test."""
    yield kvquant.register
    for one in kvquant.list_transforms():
        if one.distribution == registry.IN_PROCESS:
            kvquant.unregister(one.name, kind="transform")


def listed(name):
    return [one for one in kvquant.list_transforms() if one.name == name]


# ------------------------------------------------------------------------------------------------ installed


def test_the_built_in_ones_come_as_everybody_s():
    """Through entry points of kvquant's own distribution."""
    assert {one.name: one.distribution for one in kvquant.list_transforms()} == {
        "hadamard": "kvquant",
        "random": "kvquant",
    }


def test_an_installed_one_is_imported_when_it_is_made(install):
    """Neither listing nor looking it up does."""
    install("good_transform")
    (found,) = listed("reverse")
    assert kvquant.get_transform("Reverse") == kvquant.get_transform("kvquant-good-transform:reverse") == found
    assert (found.distribution, found.version, found.spec.summary) == (
        "kvquant-good-transform",
        "2.1",
        "Channels in reverse order",
    )
    assert "kvquant_test_good_transform.transform" not in sys.modules
    assert found.create(96).head_dim == 96


def test_a_backend_may_have_the_same_name(install):
    """One module may declare both, and each kind is a world of its own."""
    install("good_transform")
    assert kvquant.get_backend("reverse").capabilities.nbits == (4,)
    assert kvquant.get_transform("reverse").spec.factory == "kvquant_test_good_transform.transform:Reverse"
    assert "halves" not in {backend.name for backend in kvquant.list_backends()}


def test_an_unknown_name_gets_the_closest_and_the_list():
    """And the command that lists them."""
    with pytest.raises(UnknownTransformError) as caught:
        kvquant.get_transform("hadamart")
    assert str(caught.value) == (
        "unknown transform 'hadamart'. Did you mean 'hadamard'? Installed: hadamard, random. "
        "Run 'kvquant list-transforms'."
    )


def test_a_name_that_is_no_string_is_refused():
    """As a backend's."""
    with pytest.raises(OptionValueError, match="transform=3 cannot work: expected the name of a transform"):
        kvquant.get_transform(3)


@pytest.mark.parametrize("name", REASONS)
def test_a_plugin_that_fails_is_broken_with_the_reason(install, name):
    """And leaves the others alone."""
    install("broken_transforms")
    (found,) = listed(name)
    assert (found.availability.status, found.availability.reason) == ("broken", REASONS[name])
    with pytest.raises(BrokenTransformError) as caught:
        kvquant.get_transform(name)
    assert str(caught.value) == (
        f"transform {name!r}, from kvquant-broken-transforms 1.0, cannot be used: {REASONS[name]}. "
        "Next step: upgrade kvquant-broken-transforms, or report this to its author"
    )
    assert kvquant.get_transform("hadamard").availability.ok


def test_one_for_another_api_is_incompatible(install):
    """With both versions."""
    install("broken_transforms")
    with pytest.raises(IncompatibleTransformError, match=r"for version 1000 of the plugin API.*upgrade kvquant$"):
        kvquant.get_transform("newer")


def test_two_with_one_name_are_an_error_when_it_is_used(install):
    """The distribution chooses."""
    install("good_transform", "twin_transform")
    with pytest.raises(DuplicateTransformError, match="2 distributions provide a transform of that name"):
        kvquant.get_transform("reverse")
    assert kvquant.get_transform("kvquant-twin-transform:reverse").availability.ok
    assert [one.availability.status for one in listed("reverse")] == ["duplicate", "duplicate"]
    assert kvquant.get_backend("reverse").availability.ok


@pytest.mark.parametrize(
    ("variable", "value"), [("KVQUANT_BLOCK_TRANSFORMS", "reverse"), ("KVQUANT_LOAD_TRANSFORMS", "hadamard")]
)
def test_the_environment_can_block_them(install, monkeypatch, variable, value):
    """With variables of their own."""
    install("good_transform")
    monkeypatch.setenv(variable, value)
    with pytest.raises(BlockedTransformError, match=variable):
        kvquant.get_transform("reverse")
    assert kvquant.get_backend("reverse").availability.ok


# ------------------------------------------------------------------------------------------------ making one


def test_a_size_that_cannot_be_done_is_an_error_of_its_own(install):
    """In the plugin's words."""
    install("good_transform")
    with pytest.raises(HeadDimError) as caught:
        kvquant.get_transform("halves").create(80)
    assert str(caught.value) == "transform 'halves' cannot do head_dim=80: at most 64 channels work"


@pytest.mark.parametrize(
    "error", [ValueError(), ValueError("\n"), UnspeakableError()], ids=["empty", "blank", "raises"]
)
def test_a_size_that_is_refused_without_a_word_is_an_error_like_any_other(known, error):
    """The type is all that is known then."""

    def refuses(head_dim):
        raise error

    known(transform("refuses", refuses))
    with pytest.raises(HeadDimError) as caught:
        kvquant.get_transform("refuses").create(3)
    assert str(caught.value) == f"transform 'refuses' cannot do head_dim=3: {type(error).__name__}"


def test_a_factory_that_fails_otherwise_says_whose_it_is(known, install):
    """What it raises, what it imports, and what it makes."""

    def raises(head_dim):
        raise KeyError("no")

    known(transform("raises", raises))
    with pytest.raises(TransformFactoryError, match=r"'raises', from in-process, could not make a transform for"):
        kvquant.get_transform("raises").create(64)
    known(transform("no-transform", lambda head_dim: object()))
    with pytest.raises(TransformContractError, match="returned a object without the methods apply, undo"):
        kvquant.get_transform("no-transform").create(64)
    install("twin_transform")
    with pytest.raises(TransformImportError, match="importing its transform 'nowhere:Nothing' failed: ModuleNotFound"):
        kvquant.get_transform("reverse").create(64)


# ------------------------------------------------------------------------------------------------ in this process


def test_a_spec_is_registered_and_forgotten(known):
    """Beside a backend of the same name, which stays."""
    known(backend_spec("mine"))
    known(transform())
    assert kvquant.get_transform("in-process:Mine").create(7).head_dim == 7
    kvquant.unregister("mine", kind="transform")
    with pytest.raises(UnknownTransformError):
        kvquant.get_transform("mine")
    assert kvquant.get_backend("mine").availability.ok
    kvquant.unregister("mine")


def test_an_object_with_both_hooks_brings_both_or_none(known):
    """A clash of one leaves the other out, too."""
    both = SimpleNamespace(
        kvquant_register_backends=hookimpl(lambda: [backend_spec("both")]),
        kvquant_transforms=hookimpl(lambda: [transform("both"), transform("hadamard")]),
    )
    with pytest.raises(TransformExistsError, match="there is a transform 'hadamard' already, from kvquant"):
        known(both)
    assert "both" not in {backend.name for backend in kvquant.list_backends()}
    known(both, replace=True)
    assert kvquant.get_transform("hadamard").distribution == "in-process"
    assert kvquant.get_backend("both").availability.ok
    kvquant.unregister("both")


def test_one_hook_may_declare_nothing_where_the_other_does(known):
    """A plugin may come to have none in some environment; one that brings nothing at all is a mistake."""
    nothing, something = hookimpl(lambda: [*()]), hookimpl(lambda: [transform("something")])
    known(SimpleNamespace(kvquant_register_backends=nothing, kvquant_transforms=something))
    assert kvquant.get_transform("something").availability.ok
    backends = hookimpl(lambda: [backend_spec("beside")])
    known(SimpleNamespace(kvquant_register_backends=backends, kvquant_transforms=nothing))
    assert kvquant.get_backend("beside").availability.ok
    kvquant.unregister("beside")
    with pytest.raises(BackendSpecError, match="it declares no backend and no transform"):
        known(SimpleNamespace(kvquant_register_backends=nothing, kvquant_transforms=nothing))


def test_a_declaration_that_cannot_work_is_refused(known):
    """With each mistake in a sentence; a hook that declares nothing is one."""
    with pytest.raises(TransformSpecError) as caught:
        known(transform("Mine!", 3, url=None))
    assert str(caught.value) == (
        "transform 'Mine!' cannot be registered: name='Mine!' must be lower-case letters, digits and single '-', '_' "
        "or '.' between them; factory=3 must be 'module:Class' or a callable; url=None must be a string."
    )
    with pytest.raises(TransformSpecError, match="it declares no transform"):
        known(SimpleNamespace(kvquant_transforms=hookimpl(lambda: [*()])))
    with pytest.raises(IncompatibleTransformError):
        known(transform(api_version=2))


def test_the_kind_of_what_is_forgotten_need_not_be_said(known):
    """Where one kind has the name; where both have it, the backend goes first."""
    known(transform())
    known(backend_spec("mine"))
    kvquant.unregister("Mine")
    assert "mine" not in {backend.name for backend in kvquant.list_backends()}
    kvquant.unregister("in-process:mine")
    assert not listed("mine")
    known(transform())
    with pytest.raises(BackendNotRegisteredError, match=r"backend 'mind' was not registered .* Registered: .*mine\."):
        kvquant.unregister("mind")
    with pytest.raises(BackendNotRegisteredError):
        kvquant.unregister("mine", kind="backend")


def test_forgetting_what_was_not_registered():
    """An installed transform, or a kind that there is not."""
    with pytest.raises(TransformNotRegisteredError, match="transform 'hadamard' was not registered in this process"):
        kvquant.unregister("hadamard", kind="transform")
    with pytest.raises(OptionValueError, match="kind='rotation' cannot work: expected 'backend' or 'transform'"):
        kvquant.unregister("hadamard", kind="rotation")

"""Backends registered in-process."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest

import kvquant
from kvquant import registry
from kvquant.errors import (
    BackendExistsError,
    BackendFactoryError,
    BackendImportError,
    BackendNotRegisteredError,
    BackendSpecError,
    IncompatibleBackendError,
    MissingRequirementError,
    UnknownBackendError,
)
from kvquant.plugin import BackendSpec, Capabilities, Requirement, Scheme, hookimpl

SCHEME = Scheme(4, "token", 64)


class Nothing:
    def __init__(self, scheme):
        self.scheme = scheme

    def quantize(self, rows):
        return rows


def spec(name="mine", factory=Nothing, **options):
    return BackendSpec(name, factory, Capabilities(nbits=(4,)), **options)


class Plugin:
    @hookimpl
    def kvquant_register_backends(self):
        return [spec("one"), spec("two")]


def test_a_spec_is_found_and_used(registered, installed):
    """A class in a notebook is a backend, in listings and by name."""
    kvquant.list_backends()
    registered(spec())
    (backend,) = installed("mine")
    assert (backend.distribution, backend.version, backend.availability.status) == ("in-process", "", "ok")
    assert kvquant.get_backend("Mine").create(SCHEME).scheme is SCHEME
    assert kvquant.get_backend("in-process:mine") == backend


def test_an_object_with_the_hook_brings_all_that_it_declares(registered):
    """A plugin's module can be tried before it is packaged."""
    registered(Plugin())
    assert kvquant.get_backend("one").name == "one"
    assert kvquant.get_backend("two").name == "two"


def test_a_module_with_the_hook_works(registered):
    """The same for a module."""

    @hookimpl
    def kvquant_register_backends():
        return [spec("from-module")]

    module = ModuleType("a_plugin")
    module.kvquant_register_backends = kvquant_register_backends
    registered(module)
    assert kvquant.get_backend("from-module").availability.ok


def test_a_name_is_not_taken_twice(registered):
    """Neither one that was registered before nor an installed one."""
    registered(spec())
    with pytest.raises(BackendExistsError) as caught:
        registered(spec())
    assert str(caught.value) == (
        "there is a backend 'mine' already, from this process. Choose another name, or pass replace=True to put yours "
        "in its place."
    )
    with pytest.raises(BackendExistsError, match="there is a backend 'reference' already, from kvquant"):
        registered(spec("reference"))


def test_replacing_an_installed_backend(registered, installed):
    """With replace=True it stands in for the installed one, which is still there under its distribution."""
    registered(spec("reference"), replace=True)
    assert kvquant.get_backend("reference").distribution == "in-process"
    assert [backend.distribution for backend in installed("reference")] == ["in-process"]
    assert kvquant.get_backend("kvquant:reference").distribution == "kvquant"
    kvquant.unregister("reference")
    assert kvquant.get_backend("reference").distribution == "kvquant"


def test_unregister(registered):
    """It is gone, under any case."""
    registered(spec())
    kvquant.unregister("MINE")
    with pytest.raises(UnknownBackendError):
        kvquant.get_backend("mine")


def test_unregistering_what_was_not_registered(registered):
    """An installed backend cannot be unregistered, and the error lists what can."""
    registered(spec())
    with pytest.raises(BackendNotRegisteredError) as caught:
        kvquant.unregister("reference")
    assert caught.value.name == "reference"
    assert "mine" in caught.value.registered


def test_registered_backends_survive_refresh(registered):
    """Looking for installed backends anew is no reason to forget these."""
    registered(spec())
    registry.refresh()
    assert kvquant.get_backend("mine").availability.ok


def test_registered_backends_are_not_the_environments_business(registered, monkeypatch):
    """The variables keep installed code from being loaded; this code is loaded already."""
    registered(spec())
    monkeypatch.setenv("KVQUANT_LOAD_BACKENDS", "reference")
    assert kvquant.get_backend("mine").availability.ok


def test_their_requirements_count(registered):
    """A missing library is told in the same way."""
    registered(spec(requires=(Requirement("a-library-that-is-not-there"),)))
    with pytest.raises(MissingRequirementError, match=r"Next step: install a-library-that-is-not-there$"):
        kvquant.get_backend("mine").create(SCHEME)


def test_their_errors_name_this_process(registered):
    """Where an installed one names its distribution."""

    def fails(scheme):
        raise RuntimeError("no")

    def imports(scheme):
        import a_library_that_is_not_there  # noqa: F401

    registered(spec("fails", fails))
    with pytest.raises(BackendFactoryError, match="backend 'fails', from in-process, could not make a quantizer"):
        kvquant.get_backend("fails").create(SCHEME)
    registered(spec("imports", imports))
    with pytest.raises(BackendImportError, match=r"importing its quantizer '.*imports' failed"):
        kvquant.get_backend("imports").create(SCHEME)


# ------------------------------------------------------------------------------------------------ refusals


def refusal(backend):
    with pytest.raises(BackendSpecError) as caught:
        kvquant.register(backend)
    return str(caught.value)


def test_several_mistakes_are_named_at_once():
    """Nothing is registered, and each mistake is one sentence."""
    wrong = BackendSpec("Mine!", "nowhere", Capabilities(nbits=(4, 5)))
    assert refusal(wrong) == (
        "backend 'Mine!' cannot be registered: name='Mine!' must be lower-case letters, digits and single '-', '_' or "
        "'.' between them; factory='nowhere' must be 'module:Class' or a callable; capabilities.nbits=(4, 5) must be a "
        "tuple of one or more of 1, 2, 3, 4, 8."
    )


def test_one_mistake_among_several_backends_registers_none():
    """All or nothing."""
    plugin = SimpleNamespace()
    plugin.kvquant_register_backends = hookimpl(lambda: [spec("fine"), spec("not fine")])
    assert "backend 'not fine' cannot be registered" in refusal(plugin)
    with pytest.raises(UnknownBackendError):
        kvquant.get_backend("fine")


def test_one_name_twice_in_one_go():
    """As in a plugin."""
    plugin = SimpleNamespace(kvquant_register_backends=hookimpl(lambda: [spec("same"), spec("same")]))
    assert refusal(plugin) == "backend 'same' cannot be registered: it is declared twice."


def test_another_api_version():
    """As in a plugin."""
    with pytest.raises(IncompatibleBackendError, match="written for version 2 of the plugin API"):
        kvquant.register(spec(api_version=2))


@pytest.mark.parametrize(
    ("thing", "problem"),
    [
        (Nothing, "its hook kvquant_register_backends or kvquant_transforms is not there"),
        (
            SimpleNamespace(kvquant_register_backends=lambda: [spec()]),
            "its hook kvquant_register_backends lacks the decorator @kvquant.plugin.hookimpl",
        ),
        (SimpleNamespace(kvquant_register_backends=hookimpl(lambda: [*()])), "it declares no backend"),
        (
            SimpleNamespace(kvquant_register_backends=hookimpl(lambda: ["mine"])),
            "its hook kvquant_register_backends must list BackendSpecs, and lists a str",
        ),
    ],
)
def test_something_that_is_no_plugin(thing, problem):
    """The error says what is missing."""
    assert refusal(thing) == f"{type(thing).__name__} object cannot be registered: {problem}."


def test_what_an_own_hook_raises_is_not_touched():
    """In a notebook the traceback is the message."""

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        kvquant.register(SimpleNamespace(kvquant_register_backends=hookimpl(fails)))

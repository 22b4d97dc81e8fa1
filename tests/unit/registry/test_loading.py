"""A plugin that fails is listed as broken, with the reason, and takes nothing else down."""

from __future__ import annotations

import pytest

import kvquant
from kvquant.errors import BrokenBackendError, IncompatibleBackendError
from kvquant.registry import find_backend

HOOK = "kvquant_register_backends"
REASONS = {
    "broken-import": "its plugin fails to load: ModuleNotFoundError: No module named 'a_library_that_is_not_there'",
    "sys-exit": "its plugin fails to load: SystemExit: wrong Python",
    "panic": "its plugin fails to load: PanicException: index out of bounds",
    "hook-raises": "its plugin fails to load: TypeError: BackendSpec.__init__() got an unexpected keyword argument "
    "'from_the_future'",
    "hook-exits": "its plugin fails to load: SystemExit: 3",
    "misspelt-hook": f"it has a hook kvquant_register_backend, which kvquant does not know (it knows {HOOK}, "
    "kvquant_transforms)",
    "undecorated-hook": f"its hook {HOOK} lacks the decorator @kvquant.plugin.hookimpl",
    "no-hook": f"its hook {HOOK} is not there",
    "wrong-signature": f"its hook {HOOK} does not fit: Argument(s) {{'registry'}} are declared in the hookimpl but can "
    "not be found in the hookspec",
    "wrong-return": f"its hook {HOOK} must return a list, and returned a BackendSpec",
    "other-name": "its entry point is named 'other-name', and its hook declares 'another'",
    "declared-twice": "its hook declares 'declared-twice' 2 times",
    "bad-spec": "factory='nowhere.Nothing' must be 'module:Class' or a callable; "
    "capabilities.nbits=(5,) must be a tuple of one or more of 1, 2, 3, 4, 8; "
    "capabilities.axes='channel' must be a tuple of one or more of channel, token",
}


@pytest.mark.parametrize("name", REASONS)
def test_a_plugin_that_fails_is_broken_with_the_reason(install, installed, name):
    """Whatever a plugin does at import, in its hook or in its declaration, it is listed with what went wrong."""
    install(name.replace("-", "_"))
    (backend,) = installed(name)
    assert backend.availability.status == "broken"
    assert backend.availability.reason == REASONS[name]
    assert backend.availability.hint == f"upgrade kvquant-{name}, or report this to its author"
    assert backend.spec is None


@pytest.mark.parametrize("name", ["broken-import", "sys-exit", "hook-raises"])
def test_using_a_broken_plugin_says_whose_it_is(install, name):
    """The error of get_backend names plugin and distribution, and carries the plugin's own traceback as a note."""
    install(name.replace("-", "_"))
    with pytest.raises(BrokenBackendError) as caught:
        kvquant.get_backend(name)
    error = caught.value
    assert (error.name, error.distribution, error.version) == (name, f"kvquant-{name}", "1.0")
    assert str(error) == (
        f"backend {name!r}, from kvquant-{name} 1.0, cannot be used: {REASONS[name]}. "
        f"Next step: upgrade kvquant-{name}, or report this to its author"
    )
    assert f"kvquant_test_{name.replace('-', '_')}.py" in error.details
    assert error.__notes__ == [f"The plugin's own traceback:\n{error.details.rstrip()}"]


def test_all_broken_plugins_together_leave_the_good_ones_alone(install, installed):
    """Listing goes on past every failure, and the built-in backend still works."""
    install("good", *(name.replace("-", "_") for name in REASONS))
    assert {name: installed(name)[0].availability.status for name in REASONS} == dict.fromkeys(REASONS, "broken")
    assert installed("good")[0].availability.ok
    assert kvquant.get_backend("reference").availability.ok


def test_an_interrupt_is_no_failure_of_the_plugin(install):
    """Ctrl-C while a plugin is being imported stops the program."""
    install("interrupt")
    with pytest.raises(KeyboardInterrupt):
        kvquant.list_backends()


def test_reasons_are_one_clean_line(install):
    """Line breaks, control characters and endless messages of a plugin do not reach the terminal."""
    install("garbled")
    reason = find_backend("garbled").availability.reason
    assert reason.startswith("its plugin fails to load: ValueError: first line second[2J line!!!")
    assert reason.isprintable()
    assert reason.endswith("! [...]")
    assert len(reason) < 400


@pytest.mark.parametrize(
    ("name", "version", "step"), [("newer-api", 1000, "kvquant"), ("older-api", 0, "kvquant-older-api")]
)
def test_a_plugin_for_another_api_is_incompatible(install, installed, name, version, step):
    """It is listed with both versions and with what to upgrade, and using it is an error of its own class."""
    install(name.replace("-", "_"))
    (backend,) = installed(name)
    assert backend.availability.status == "incompatible"
    with pytest.raises(IncompatibleBackendError) as caught:
        kvquant.get_backend(name)
    assert (caught.value.plugin_api, caught.value.supported_api) == (version, 1)
    assert str(caught.value) == (
        f"backend {name!r}, from kvquant-{name} 1.0, cannot be used: it was written for version {version} of the "
        f"plugin API, and this kvquant has version 1. Next step: upgrade {step}"
    )


def test_one_module_serves_two_names(install):
    """Two entry points may refer to one module; each gets the declaration of its name."""
    install("good")
    assert kvquant.get_backend("good").capabilities.nbits == (2, 4)
    assert kvquant.get_backend("good-four").capabilities.nbits == (4,)


@pytest.mark.parametrize("name", ["no value", "a line without an equals sign"])
def test_an_entry_point_that_refers_to_nothing_is_broken(install, installed, name):
    """Damaged metadata is named as such."""
    install("bad_metadata")
    (backend,) = installed(name)
    assert backend.availability.reason == "its entry point refers to '', which names no module"


def test_a_plugin_is_loaded_once(install, capsys):
    """Asking again does not import or ask the plugin again."""
    install("noisy")
    for _ in range(3):
        kvquant.get_backend("noisy")
        kvquant.list_backends()
    assert capsys.readouterr().out == "noise on standard output\n"


def test_a_name_loads_its_own_plugin_only(install, capsys):
    """Asking for one backend imports no other plugin."""
    install("good", "noisy")
    kvquant.get_backend("good")
    assert capsys.readouterr().out == ""

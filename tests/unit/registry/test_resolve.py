"""Names to backends."""

from __future__ import annotations

import pytest

import kvquant
from kvquant import registry
from kvquant.errors import BlockedBackendError, DuplicateBackendError, OptionValueError, UnknownBackendError


def message(name):
    with pytest.raises(UnknownBackendError) as caught:
        kvquant.get_backend(name)
    return str(caught.value)


def names():
    return ", ".join(sorted({backend.name for backend in kvquant.list_backends()}))


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name", ["reference", "REFERENCE", "Reference", " reference ", "kvquant:reference", "KVQuant:Reference"]
)
def test_names_are_case_insensitive(name):
    """Any case will do, and so will the name with its distribution."""
    backend = kvquant.get_backend(name)
    assert (backend.name, backend.distribution) == ("reference", "kvquant")
    assert backend.qualified_name == "kvquant:reference"


def test_a_misspelt_name_gets_the_closest_and_the_list():
    """The error says what was meant, what there is and how to see more."""
    assert message("refrence") == (
        f"unknown backend 'refrence'. Did you mean 'reference'? Installed: {names()}. Run 'kvquant list-backends'."
    )


def test_a_name_like_nothing_gets_the_list():
    """No wild guesses."""
    assert message("xyzzy") == f"unknown backend 'xyzzy'. Installed: {names()}. Run 'kvquant list-backends'."


def test_no_command_is_made_from_what_was_typed():
    """An install command appears for names of kvquant's own table only, and says what stands there."""
    assert "install" not in message("xyzzy").replace("Installed", "")
    assert "install" not in message("kvquant-evil").replace("Installed", "")


def test_a_name_of_the_table_that_is_not_installed_gets_its_command(monkeypatch):
    """As for a backend of kvquant's whose entry point is not there."""
    monkeypatch.setattr(registry.public.BACKENDS, "_installed", list)
    assert message("hqq").endswith("Run 'kvquant list-backends'. To install it: pip install 'kvquant[hqq]'")
    assert "Did you mean 'hqq'?" in message("hqqq")
    assert message("hqqq").endswith("To install it: pip install 'kvquant[hqq]'")


def test_other_names_for_a_backend_lead_to_it():
    """What people call a backend elsewhere is recognised, and not taken for the name."""
    assert "Did you mean 'bitsandbytes'?" in message("bnb")
    assert "Did you mean 'lloydmax' or 'trellis'?" in message("TurboQuant")


def test_a_misspelt_distribution_gets_the_qualified_name():
    """Where the distribution was given, the suggestion has one, too."""
    assert message("kvqant:reference").count("'kvquant:reference'") == 1


@pytest.mark.parametrize("name", [None, 3, b"hqq"])
def test_a_name_that_is_no_string_is_refused(name):
    """It is an option's value that can never work."""
    with pytest.raises(OptionValueError, match="expected the name of a backend"):
        kvquant.get_backend(name)


# ------------------------------------------------------------------------------------------------ duplicates


def test_two_plugins_with_one_name_are_an_error_when_it_is_used(install):
    """The error names both distributions and how to choose."""
    install("duplicate_b", "duplicate_a")
    with pytest.raises(DuplicateBackendError) as caught:
        kvquant.get_backend("Twin")
    assert caught.value.distributions == ("kvquant-twin-a", "kvquant-twin-b")
    assert str(caught.value) == (
        "backend 'twin' cannot be used: 2 distributions provide a backend of that name: kvquant-twin-a, "
        "kvquant-twin-b. Next step: choose one by writing 'kvquant-twin-a:twin' or 'kvquant-twin-b:twin'"
    )


@pytest.mark.parametrize("name", ["kvquant-twin-b:twin", "KVQuant_Twin.B:TWIN"])
def test_the_distribution_chooses_among_duplicates(install, name):
    """``"distribution:name"`` is unambiguous; distributions are compared as package indexes do."""
    install("duplicate_a", "duplicate_b")
    backend = kvquant.get_backend(name)
    assert (backend.distribution, backend.version, backend.spec.summary) == ("kvquant-twin-b", "2.0", "twin b")
    assert backend.availability.ok


def test_both_duplicates_are_listed(install, installed):
    """Each says so, and each says what it can do."""
    install("duplicate_a", "duplicate_b")
    assert [(b.distribution, b.availability.status, b.capabilities.nbits) for b in installed("twin")] == [
        ("kvquant-twin-a", "duplicate", (4,)),
        ("kvquant-twin-b", "duplicate", (4,)),
    ]
    with pytest.raises(DuplicateBackendError):
        installed("twin")[0].require()


def test_other_names_do_not_suffer_from_a_duplicate(install):
    """A clash is the business of that name alone."""
    install("duplicate_a", "duplicate_b", "good")
    assert kvquant.get_backend("good").availability.ok


# ------------------------------------------------------------------------------------------------ the environment


def test_blocking_by_name(install, installed, monkeypatch, capsys):
    """A blocked backend is listed as such, its plugin is not imported, and using it says which variable to change."""
    install("noisy")
    monkeypatch.setenv("KVQUANT_BLOCK_BACKENDS", "other, NOISY")
    (backend,) = installed("noisy")
    assert (backend.availability.status, backend.spec) == ("blocked", None)
    with pytest.raises(BlockedBackendError) as caught:
        kvquant.get_backend("noisy")
    assert (caught.value.variable, caught.value.value) == ("KVQUANT_BLOCK_BACKENDS", "other, NOISY")
    assert str(caught.value) == (
        "backend 'noisy' cannot be used: the environment's KVQUANT_BLOCK_BACKENDS='other, NOISY' names it. "
        "Next step: take it out of KVQUANT_BLOCK_BACKENDS"
    )
    assert capsys.readouterr().out == ""


def test_allowing_by_name(install, installed, monkeypatch):
    """With a list of those allowed, all others are blocked."""
    install("good", "duplicate_a")
    monkeypatch.setenv("KVQUANT_LOAD_BACKENDS", "good,reference")
    assert kvquant.get_backend("good").availability.ok
    assert installed("twin")[0].availability.status == "blocked"
    with pytest.raises(BlockedBackendError) as caught:
        kvquant.get_backend("twin")
    assert str(caught.value) == (
        "backend 'twin' cannot be used: the environment's KVQUANT_LOAD_BACKENDS='good,reference' does not name it. "
        "Next step: add it to KVQUANT_LOAD_BACKENDS"
    )


def test_blocking_wins_over_allowing(install, monkeypatch):
    """A name on both lists is blocked."""
    install("good")
    monkeypatch.setenv("KVQUANT_LOAD_BACKENDS", "good")
    monkeypatch.setenv("KVQUANT_BLOCK_BACKENDS", "good")
    with pytest.raises(BlockedBackendError, match="KVQUANT_BLOCK_BACKENDS"):
        kvquant.get_backend("good")


@pytest.mark.parametrize("value", ["", " , "])
@pytest.mark.parametrize("variable", ["KVQUANT_LOAD_BACKENDS", "KVQUANT_BLOCK_BACKENDS"])
def test_an_empty_variable_is_no_variable(monkeypatch, variable, value):
    """Shells have no other way to unset one for a single command."""
    monkeypatch.setenv(variable, value)
    assert kvquant.get_backend("reference").availability.ok


def test_blocking_one_of_two_duplicates_leaves_the_other(install, installed, monkeypatch):
    """``"distribution:name"`` works in the environment, too, and settles a clash for good."""
    install("duplicate_a", "duplicate_b")
    monkeypatch.setenv("KVQUANT_BLOCK_BACKENDS", "kvquant_twin_a:twin")
    assert kvquant.get_backend("twin").distribution == "kvquant-twin-b"
    assert [backend.availability.status for backend in installed("twin")] == ["blocked", "ok"]


def test_the_environment_is_read_each_time(install, monkeypatch):
    """Notebooks change it as they go."""
    install("good")
    kvquant.get_backend("good")
    monkeypatch.setenv("KVQUANT_BLOCK_BACKENDS", "good")
    with pytest.raises(BlockedBackendError):
        kvquant.get_backend("good")


def test_blocked_backends_are_not_suggested(install, monkeypatch):
    """The list in an error holds what could be used."""
    install("good")
    monkeypatch.setenv("KVQUANT_BLOCK_BACKENDS", "good")
    assert "good" not in message("xyzzy").split("Installed: ")[1].replace("good-four", "")


# ------------------------------------------------------------------------------------------------ listing


def test_the_listing_is_sorted_by_name(install):
    """By name, then by distribution."""
    install("good", "duplicate_b", "duplicate_a", "broken_import")
    keys = [(backend.name, backend.distribution) for backend in kvquant.list_backends()]
    assert keys == sorted(keys)


def test_what_is_installed_later_shows_after_refresh(monkeypatch, installed):
    """Discovery is remembered; `refresh` looks again."""
    from tests.plugins.on_path import HERE

    assert installed("good") == []
    monkeypatch.syspath_prepend(HERE / "good")
    assert installed("good") == []
    registry.refresh()
    assert len(installed("good")) == 1
    monkeypatch.undo()
    registry.refresh()


def test_a_broken_backend_has_no_capabilities(install, installed):
    """Asking for them says why."""
    install("broken_import")
    with pytest.raises(ImportError, match="a_library_that_is_not_there"):
        _ = installed("broken-import")[0].capabilities

"""Whether a backend can be used is told from metadata."""

from __future__ import annotations

import pluggy
import pytest

import kvquant
from kvquant.errors import MissingRequirementError, OutdatedRequirementError
from kvquant.plugin import BackendSpec, Capabilities, Requirement, Scheme
from kvquant.registry.availability import missing_requirements


def spec(*requires, name="mine", **options):
    return BackendSpec(name, "a:b", Capabilities(nbits=(4,)), requires=requires, **options)


def test_a_missing_library_shows_in_the_listing_and_in_get_backend(install, installed):
    """get_backend returns the backend, so that it can be looked at."""
    install("missing_requirement")
    (listed,) = installed("missing-requirement")
    backend = kvquant.get_backend("missing-requirement")
    assert listed == backend
    assert backend.availability.status == "missing"
    assert not backend.availability.ok
    assert backend.availability.reason == (
        "it needs a-library-that-is-not-there>=2.0 (not installed), pluggy>=1000 (1.7.0 is installed)"
    ).replace("1.7.0", pluggy.__version__)
    assert backend.capabilities.nbits == (4,)


@pytest.mark.parametrize("use", [lambda b: b.require(), lambda b: b.create(Scheme(4, "token", 64))])
def test_using_a_backend_without_its_library_says_what_to_do(install, use):
    """`require` and `create` raise, with the plugin's own hint."""
    install("missing_requirement")
    with pytest.raises(MissingRequirementError) as caught:
        use(kvquant.get_backend("missing-requirement"))
    assert caught.value.requirements[0] == ("a-library-that-is-not-there>=2.0", None)
    assert str(caught.value).endswith("Next step: pip install 'kvquant-missing-requirement[library]'")
    assert not isinstance(caught.value, OutdatedRequirementError)


def test_a_library_that_is_too_old_is_an_error_of_its_own(install):
    """The text names what is needed and what is there."""
    install("outdated_requirement")
    backend = kvquant.get_backend("outdated-requirement")
    assert backend.availability.status == "missing"
    with pytest.raises(OutdatedRequirementError) as caught:
        backend.require()
    assert caught.value.requirements == (("kvquant-old-library>=2.0", "1.9"),)
    assert str(caught.value) == (
        "backend 'outdated-requirement' cannot be used: it needs kvquant-old-library>=2.0 (1.9 is installed). "
        "Next step: install kvquant-old-library>=2.0"
    )


def test_an_error_is_made_anew_each_time(install):
    """An error that is kept would keep the frames that it passed through alive."""
    install("outdated_requirement")
    backend = kvquant.get_backend("outdated-requirement")
    errors = []
    for _ in range(2):
        with pytest.raises(OutdatedRequirementError) as caught:
            backend.require()
        errors.append(caught.value)
    assert errors[0] is not errors[1]


@pytest.mark.parametrize("minimum", [None, "1.9", "1.9.0rc1", "1"])
def test_a_library_that_is_new_enough_is_fine(install, minimum):
    """Versions are compared as versions, not as text."""
    install("outdated_requirement")
    assert missing_requirements(spec(Requirement("kvquant-old-library", minimum)), "someone") is None


def test_names_of_libraries_are_compared_as_indexes_do(install):
    """Case and punctuation make no difference."""
    install("outdated_requirement")
    assert missing_requirements(spec(Requirement("KVQuant.old_Library")), "someone") is None


@pytest.mark.parametrize("version", ["home-made", ""])
def test_a_version_that_cannot_be_compared_is_let_through(install, tmp_path, version):
    """A home-made build is not refused on a guess."""
    folder = tmp_path / "homemade-1.dist-info"
    folder.mkdir()
    line = f"Version: {version}\n" if version else ""
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: homemade\n{line}")
    install(tmp_path)
    assert missing_requirements(spec(Requirement("homemade", "2.0")), "someone") is None


@pytest.mark.parametrize(
    ("declared", "distribution", "hint"),
    [
        (spec(Requirement("nowhere-to-be-found"), name="hqq"), "kvquant", "pip install 'kvquant[hqq]'"),
        (spec(Requirement("nowhere-to-be-found"), name="hqq", install_hint="ask me"), "kvquant", "ask me"),
        (spec(Requirement("nowhere-to-be-found"), name="hqq"), "someone", "install nowhere-to-be-found"),
    ],
)
def test_the_next_step_is_the_plugins_or_the_tables_or_plain_words(declared, distribution, hint):
    """A plugin's hint goes first; kvquant's table speaks for kvquant's own backends only."""
    assert missing_requirements(declared, distribution)().hint == hint

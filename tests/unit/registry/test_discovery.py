"""Names come from metadata."""

from __future__ import annotations

import sys

import pytest

import kvquant
from kvquant.plugin.hookspecs import BACKEND_GROUP
from kvquant.registry.discovery import installed_plugins


def named(name):
    return [plugin for plugin in installed_plugins(BACKEND_GROUP) if plugin.name == name]


def test_entry_points_are_found_with_their_distribution(install):
    """An entry point comes with what it refers to, and with name and version of its distribution."""
    install("good")
    (plugin,) = named("good-four")
    assert (plugin.value, plugin.distribution, plugin.version) == ("kvquant_test_good", "kvquant-good", "1.2")


def test_names_are_in_lower_case(install):
    """An entry point that is called GOOD is the backend good."""
    install("good")
    assert len(named("good")) == 1


def test_the_built_in_backend_comes_the_same_way():
    """The reference backend is an entry point of kvquant's own distribution."""
    (plugin,) = named("reference")
    assert (plugin.distribution, plugin.version) == ("kvquant", kvquant.__version__)


def test_nothing_is_imported(install):
    """Looking for plugins imports none of them."""
    install("good", "sys_exit")
    installed_plugins(BACKEND_GROUP)
    assert not [name for name in sys.modules if name.startswith("kvquant_test_")]


def test_a_distribution_that_is_on_the_path_twice_counts_once(install):
    """The first on the path hides the second, as it does for imports."""
    install("good")
    install("good")
    assert len(named("good")) == 1


def test_duplicates_are_all_there(install):
    """Two distributions with one name give two entries."""
    install("duplicate_a", "duplicate_b")
    assert [plugin.distribution for plugin in named("twin")] == ["kvquant-twin-a", "kvquant-twin-b"]


def test_damaged_metadata_is_no_reason_to_fail(install):
    """Without METADATA, and with lines that are no entry points, what can be read is read."""
    install("bad_metadata")
    (plugin,) = named("bad-metadata")
    assert (plugin.distribution, plugin.version) == ("nameless-distribution", "")


def test_two_distributions_without_a_name_do_not_hide_each_other(install, tmp_path):
    """Only the same name on the path twice means the same distribution."""
    install("bad_metadata")
    folder = tmp_path / "nameless-1.0.dist-info"
    folder.mkdir()
    (folder / "entry_points.txt").write_text("[kvquant.backends]\nalso-nameless = somewhere\n")
    install(tmp_path)
    assert named("bad-metadata")
    assert named("also-nameless")


@pytest.mark.parametrize("text", [b"[kvquant.backends]\nx = \xff\xfe", b""])
def test_entry_points_that_cannot_be_decoded_are_passed_over(install, tmp_path, text):
    """A file that is not text hides nothing but itself."""
    folder = tmp_path / "binary-1.0.dist-info"
    folder.mkdir()
    (folder / "entry_points.txt").write_bytes(text)
    install(tmp_path)
    assert named("reference")

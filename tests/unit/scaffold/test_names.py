"""The names of a new plugin: which work, what is said of those that do not, and what follows from one."""

import pytest

from kvquant.errors import PluginNameError, PluginNameTakenError
from kvquant.scaffold import names_for
from tests.plugins.on_path import plugins_on_path

RULE = "a good name has at most 30 lower-case letters, digits and single hyphens, and starts with a letter"


@pytest.mark.parametrize(
    ("name", "distribution", "package", "quantizer"),
    [
        ("foo", "kvquant-plugin-foo", "kvquant_plugin_foo", "FooQuantizer"),
        ("half-step", "kvquant-plugin-half-step", "kvquant_plugin_half_step", "HalfStepQuantizer"),
        ("q2", "kvquant-plugin-q2", "kvquant_plugin_q2", "Q2Quantizer"),
        ("kvquantile", "kvquant-plugin-kvquantile", "kvquant_plugin_kvquantile", "KvquantileQuantizer"),
        ("x-3-y", "kvquant-plugin-x-3-y", "kvquant_plugin_x_3_y", "X3YQuantizer"),
    ],
)
def test_all_names_follow_from_one(name, distribution, package, quantizer):
    """Distribution and folder, package, class."""
    names = names_for(name)
    assert (names.distribution, names.package, names.quantizer) == (distribution, package, quantizer)


@pytest.mark.parametrize(
    ("name", "problem", "suggestion"),
    [
        ("Foo", RULE, "foo"),
        ("foo_bar", RULE, "foo-bar"),
        ("my method!", RULE, "my-method"),
        ("foo--bar", RULE, "foo-bar"),
        ("-foo-", RULE, "foo"),
        ("2bit", RULE, "q2bit"),
        ("../../etc", RULE, "etc"),
        ("foo\nbar", RULE, "foo-bar"),
        ("", RULE, "my-method"),
        ("Größe", RULE, "grosse"),
        ("a" * 31, RULE, "a" * 30),
        ("lambda", "it is a keyword of Python", "my-lambda"),
        ("none", "it is a keyword of Python", "my-none"),
        ("Class", RULE, "my-class"),
        ("kvquant-plugin-foo", "the prefix 'kvquant-plugin-' is added to what you give", "foo"),
        ("kvquant", "the prefix 'kvquant-plugin-' is added to what you give", "my-method"),
        ("Reference", RULE, "my-reference"),
    ],
)
def test_a_bad_name_is_refused_with_one_that_works(name, problem, suggestion):
    """The message says what a good name is, and what is suggested is one."""
    with pytest.raises(PluginNameError) as caught:
        names_for(name)
    assert str(caught.value) == f"{name!r} cannot be the name of a new plugin: {problem}. One that works: {suggestion}"
    assert names_for(suggestion).backend == suggestion


@pytest.mark.parametrize("name", ["reference", "lloydmax", "trellis", "hqq", "quanto", "bitsandbytes"])
def test_names_of_built_in_backends_are_taken(name):
    """Whether or not their libraries are installed."""
    with pytest.raises(PluginNameTakenError, match=rf"a backend of that name comes with kvquant .*: my-{name}$"):
        names_for(name)


def test_names_of_installed_backends_are_taken():
    """The message says whose they are; a broken plugin has its name too, and none of them is imported to find out."""
    with plugins_on_path("good", "broken_import"):
        with pytest.raises(PluginNameTakenError) as caught:
            names_for("good")
        assert (caught.value.distribution, caught.value.version) == ("kvquant-good", "1.2")
        assert "a backend of that name comes with kvquant-good 1.2. One that works: my-good" in str(caught.value)
        with pytest.raises(PluginNameTakenError):
            names_for("broken-import")
    assert names_for("good").backend == "good"


def test_names_of_transforms_are_taken_too(tmp_path):
    """And those of their distributions, which the new project would hide."""
    with pytest.raises(PluginNameTakenError, match=r"a transform of that name comes with kvquant .*: my-hadamard$"):
        names_for("hadamard")
    info = tmp_path / "kvquant_plugin_foo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvquant-plugin-foo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvquant.transforms]\nbar = nowhere\n")
    with plugins_on_path(tmp_path), pytest.raises(PluginNameTakenError) as caught:
        names_for("foo")
    assert (caught.value.kind, caught.value.distribution) == ("transform", "kvquant-plugin-foo")


def test_the_distribution_of_another_backend_is_taken(tmp_path):
    """Installing the new project would take the place of the old one."""
    info = tmp_path / "kvquant_plugin_foo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvquant_plugin.foo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvquant.backends]\nbar = nowhere\nmy-foo = nowhere\n")
    with plugins_on_path(tmp_path), pytest.raises(PluginNameTakenError, match="One that works: my-my-foo"):
        names_for("foo")

"""``kvquant new-plugin``."""

import pytest

OUTPUT = """\
Wrote {folder}:
  pyproject.toml
  README.md
  LICENSE
  .gitignore
  .github/workflows/test.yml
  kvquant_plugin_foo/__init__.py
  kvquant_plugin_foo/quantizer.py
  tests/test_conformance.py
  tests/test_quantizer.py

Next steps:
  cd {folder}
  pip install -e '.[test]'
  pytest
  kvquant check-plugin foo
  kvquant list-backends

The method is in kvquant_plugin_foo/quantizer.py: put yours in its place.
"""


def test_a_project_and_the_next_steps(kvquant, tmp_path, monkeypatch):
    """Here, if no other place is named."""
    monkeypatch.chdir(tmp_path)
    result = kvquant("new-plugin", "foo")
    assert (result.exit_code, result.stdout) == (0, OUTPUT.format(folder="kvquant-plugin-foo"))
    assert (tmp_path / "kvquant-plugin-foo" / "pyproject.toml").is_file()


def test_another_place(kvquant, tmp_path):
    """The command to go there can be copied, whatever the place is called."""
    place = tmp_path / "my plugins"
    place.mkdir()
    result = kvquant("new-plugin", "foo", "--directory", str(place), "--author", "Jane Doe")
    assert f"  cd '{place}/kvquant-plugin-foo'\n" in result.stdout
    assert "Jane Doe" in (place / "kvquant-plugin-foo" / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("format_", "words"),
    [("affine", "offset=offset"), ("codebook", "table=table"), ("opaque", "return Opaque(")],
)
def test_the_format_picks_the_quantiser(kvquant, tmp_path, format_, words):
    """Each format has a method of its own."""
    assert kvquant("new-plugin", "foo", "--format", format_, "--directory", str(tmp_path)).exit_code == 0
    assert words in (tmp_path / "kvquant-plugin-foo" / "kvquant_plugin_foo" / "quantizer.py").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("Foo",), 2, "Error: 'Foo' cannot be the name of a new plugin: a good name has at most 30"),
        (("reference",), 2, "Error: 'reference' cannot be the name of a new plugin: a backend of that name comes with"),
        (("foo", "--author", "a, b"), 2, "author='a, b' cannot work"),
        (("foo", "--format", "other"), 2, "'other' is not one of 'affine', 'codebook', 'opaque'"),
        (("foo", "--directory", "nowhere"), 2, "Directory 'nowhere' does not exist"),
        ((), 2, "Missing argument 'NAME'"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(kvquant, tmp_path, monkeypatch, arguments, code, message):
    """With the exit code of bad usage."""
    monkeypatch.chdir(tmp_path)
    result = kvquant("new-plugin", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_a_failure(kvquant, tmp_path):
    """With the exit code of what failed, and the folder as it was."""
    assert kvquant("new-plugin", "foo", "--directory", str(tmp_path)).exit_code == 0
    mine = tmp_path / "kvquant-plugin-foo" / "kvquant_plugin_foo" / "quantizer.py"
    mine.write_text("# my method\n")
    result = kvquant("new-plugin", "foo", "--directory", str(tmp_path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "it exists and is not empty" in result.stderr
    assert mine.read_text() == "# my method\n"

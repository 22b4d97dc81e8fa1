"""A new project: what is in it, and what keeps it from being written."""

import subprocess
import sys
import tomllib

import pytest

import kvquant
from kvquant.errors import OptionValueError, ProjectFolderError
from kvquant.plugin import API_VERSION
from kvquant.scaffold import FORMATS, new_project

FILES = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    ".gitignore",
    ".github/workflows/test.yml",
    "kvquant_plugin_half_step/__init__.py",
    "kvquant_plugin_half_step/quantizer.py",
    "tests/test_conformance.py",
    "tests/test_quantizer.py",
}
LONGEST_NAME = "a" + "b" * 29


def texts(folder):
    """Return the text of every file by its path."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=FORMATS)
def project(request, tmp_path):
    """A project of each format: its folder."""
    return new_project("half-step", tmp_path, request.param)[0]


def test_all_files_are_there_and_filled_in(project):
    """And no placeholder is left."""
    written = texts(project)
    assert set(written) == FILES
    assert project.name == "kvquant-plugin-half-step"
    for path, text in written.items():
        assert text.endswith("\n"), path
        assert "<<" not in text.replace(" << ", ""), path


def test_the_metadata_is_complete(project):
    """Names, entry point, licence, needs; the plugin API as a number, because a default would follow kvquant's."""
    written = texts(project)
    metadata = tomllib.loads(written["pyproject.toml"])
    described = metadata["project"]
    assert described["name"] == "kvquant-plugin-half-step"
    assert described["requires-python"] == ">=3.11"
    assert described["license"] == "Apache-2.0"
    assert described["dependencies"] == [f"kvquant>={kvquant.__version__}"]
    assert described["entry-points"] == {"kvquant.backends": {"half-step": "kvquant_plugin_half_step"}}
    assert metadata["build-system"]["build-backend"] == "hatchling.build"
    assert f"api_version={API_VERSION}," in written["kvquant_plugin_half_step/__init__.py"]


@pytest.mark.parametrize("name", ["half-step", "x", LONGEST_NAME])
@pytest.mark.parametrize("format_", FORMATS)
def test_style_is_clean_by_the_project_s_own_rules(tmp_path, name, format_):
    """Whatever the length of the name."""
    folder, *_ = new_project(name, tmp_path, format_)
    for command in (["check"], ["format", "--check", "--diff"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "entry", "holder"),
    [
        ("", {"name": "The authors of kvquant-plugin-foo"}, "The authors of kvquant-plugin-foo"),
        ("Zoë O'Hara", {"name": "Zoë O'Hara"}, "Zoë O'Hara"),
        ('J. "Jo" \\ Doe', {"name": 'J. "Jo" \\ Doe'}, 'J. "Jo" \\ Doe'),
        ("Jane Doe <jane@example.org>", {"name": "Jane Doe", "email": "jane@example.org"}, "Jane Doe"),
    ],
)
def test_the_author(tmp_path, given, entry, holder):
    """In the metadata, escaped as it must be, and in the licence."""
    written = texts(new_project("foo", tmp_path, author=given)[0])
    assert tomllib.loads(written["pyproject.toml"])["project"]["authors"] == [entry]
    assert written["LICENSE"].startswith(f"Copyright {holder}\n")


@pytest.mark.parametrize("author", ["Doe, Jane", "two\nlines", "<jane@example.org>", "Jane <nowhere>", "\x1b[2J", " "])
def test_an_author_that_metadata_cannot_hold_is_refused(tmp_path, author):
    """Before anything is written."""
    with pytest.raises(OptionValueError, match=r"author=.* cannot work: expected a name, or 'A Name"):
        new_project("foo", tmp_path, author=author)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path):
    """As one that a clone has made."""
    (tmp_path / "kvquant-plugin-foo").mkdir()
    assert (new_project("foo", tmp_path)[0] / "pyproject.toml").is_file()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    """Even where the file is hidden."""
    folder = tmp_path / "kvquant-plugin-foo"
    folder.mkdir()
    (folder / ".keep").touch()
    with pytest.raises(ProjectFolderError) as caught:
        new_project("foo", tmp_path)
    assert str(caught.value) == (
        f"cannot write a project to {str(folder)!r}: it exists and is not empty. Choose another place with --directory."
    )
    assert list(folder.iterdir()) == [folder / ".keep"]


def test_a_file_in_the_way_is_left_alone(tmp_path):
    """The system's own reason is shown."""
    (tmp_path / "kvquant-plugin-foo").write_text("mine")
    with pytest.raises(ProjectFolderError, match="Not a directory"):
        new_project("foo", tmp_path)
    assert (tmp_path / "kvquant-plugin-foo").read_text() == "mine"


def test_a_link_that_leads_nowhere_is_left_alone(tmp_path):
    """It cannot be written through."""
    (tmp_path / "kvquant-plugin-foo").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ProjectFolderError, match="File exists"):
        new_project("foo", tmp_path)
    assert not (tmp_path / "nowhere").exists()

"""Everything on the page "Writing a backend" works as it stands there."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import kvquant
from kvquant.plugin import API_VERSION, BackendSpec, Capabilities, TransformSpec
from kvquant.plugin.hookspecs import TRANSFORM_GROUP
from kvquant.registry import IN_PROCESS
from kvquant.scaffold import new_project

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"

TRANSFORM_MODULE = "kvquant_plugin_cosines/__init__.py"

#: Commands that leave the machine, or that are there to do so.
NOT_RUN = {"pip install hatchling twine", "twine check dist/*", "twine upload dist/*"}


@dataclass(frozen=True)
class Block:
    """A block of code: its language, the file that it belongs into if it names one, and its text."""

    language: str
    file: str
    text: str


BLOCKS = [
    Block(*match.groups(default=""))
    for match in re.finditer(
        r'^```(\w*)(?: title="(.*?)")?\n(.*?)^```$', PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
]


def squeezed(text):
    """Return `text` with runs of white space as one space: columns are as wide as what is in them."""
    return " ".join(text.split())


@pytest.fixture
def notebook():
    """What blocks define; backends that they register are gone afterwards."""
    before = _registered()
    yield {}
    for kind, name in _registered() - before:
        kvquant.unregister(name, kind=kind)


def _registered():
    found = [("backend", one) for one in kvquant.list_backends()]
    found += [("transform", one) for one in kvquant.list_transforms()]
    return {(kind, one.name) for kind, one in found if one.distribution == IN_PROCESS}


def test_every_block_is_of_a_kind_that_is_tested_here():
    """Python, in a file or not, commands, and metadata."""
    assert len(BLOCKS) == PAGE.read_text(encoding="utf-8").count("```") / 2
    kinds = {(block.language, block.file) for block in BLOCKS}
    files = {("python", "tests/test_conformance.py"), ("python", TRANSFORM_MODULE)}
    assert kinds == {("python", ""), ("console", ""), ("toml", "")} | files


def test_the_python_blocks_run_in_order_and_print_what_they_say(notebook, capsys):
    """As cells of a notebook; among them are a backend of each format, which the conformance kit passes."""
    formats = set()
    for block in BLOCKS:
        if (block.language, block.file) != ("python", ""):
            continue
        exec(compile(block.text, PAGE.name, "exec"), notebook)  # noqa: S102  # our own page
        printed = capsys.readouterr().out
        for promised in re.findall(r"^# -> (.*)$", block.text, flags=re.MULTILINE):
            assert promised in printed
        formats |= {made.capabilities.formats[0] for made in notebook.values() if isinstance(made, BackendSpec)}
    assert formats == {"affine", "codebook", "opaque"}


@pytest.mark.timeout(900)  # it makes an environment, and checks a plugin in it
def test_the_commands_work_in_order_and_show_what_they_say(environment, tmp_path):
    """Typed one after the other; files go where the page says."""
    steps = []
    for block in BLOCKS:
        if block.file and block.file != TRANSFORM_MODULE:
            steps.append(f"test -f {block.file}\ncat > {block.file} <<'END'\n{block.text}END")
        elif block.language == "console":
            steps += re.findall(r"^\$ (.*)$", block.text, flags=re.MULTILINE)
    assert NOT_RUN.issubset(steps)
    try:
        shown = squeezed(environment.shell("\n".join(step for step in steps if step not in NOT_RUN), cwd=tmp_path))
    finally:
        environment.pip("uninstall", "--yes", "kvquant-plugin-foo")
    for block in BLOCKS:
        if block.language == "console":
            promised = [squeezed(line) for line in block.text.splitlines() if not line.startswith("$ ")]
            assert [line for line in promised if line not in shown] == []
    assert {path.suffix for path in (tmp_path / "kvquant-plugin-foo" / "dist").iterdir()} == {".gz", ".whl"}


def test_the_metadata_is_that_of_a_new_project(tmp_path):
    """As far as it is shown."""
    folder, *_ = new_project("foo", tmp_path)
    written = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    shown, of_transform = (tomllib.loads(block.text) for block in BLOCKS if block.language == "toml")
    assert shown["project"]["entry-points"] == written["project"]["entry-points"]
    assert of_transform["project"]["entry-points"] == {TRANSFORM_GROUP: {"cosines": "kvquant_plugin_cosines"}}


def test_the_module_of_the_transform_declares_it():
    """The one on the page, under the name of its entry point."""
    (block,) = (block for block in BLOCKS if block.file == TRANSFORM_MODULE)
    module = ModuleType("kvquant_plugin_cosines")
    exec(compile(block.text, PAGE.name, "exec"), vars(module))  # noqa: S102  # our own page
    kvquant.register(module)
    assert kvquant.get_transform("cosines").spec.factory == "kvquant_plugin_cosines.transform:Cosines"
    kvquant.unregister("cosines", kind="transform")


def test_every_file_of_a_new_project_is_explained(tmp_path):
    """In the table at the top."""
    folder, *files = new_project("foo", tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    assert [path for path in files if f"`{path.relative_to(folder).as_posix()}`" not in text] == []


@pytest.mark.parametrize("declaration", [Capabilities, BackendSpec, TransformSpec])
def test_every_field_of_a_declaration_has_a_row(declaration):
    """In the tables of capabilities and of the spec."""
    rows = "\n".join(re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert [name for name in declaration.__dataclass_fields__ if f"`{name}`" not in rows] == []


def test_the_version_of_the_plugin_api_is_this_one():
    """Where the page names it."""
    text = PAGE.read_text(encoding="utf-8")
    assert f"`API_VERSION`, now {API_VERSION}." in text
    assert f"`api_version={API_VERSION}`" in text

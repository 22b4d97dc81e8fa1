"""Every public name, hook, option, preset, command and variable is found in the documentation."""

from pathlib import Path

import pytest

import kvquant
import kvquant.plugin
from kvquant import errors
from kvquant.cli.main import COMMANDS
from kvquant.engine.config import OPTIONS, PRESETS
from kvquant.plugin import hookspecs

ROOT = Path(__file__).parents[2]
DOCS = "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])
HOOKS = [name for name in vars(hookspecs) if name.startswith("kvquant_")]


@pytest.mark.parametrize("name", [name for name in kvquant.__all__ if name != "__version__"])
def test_every_public_name_is_documented(name):
    """In words or as code, somewhere a reader looks."""
    assert name in DOCS
    assert getattr(kvquant, name).__doc__


@pytest.mark.parametrize("name", [*kvquant.plugin.__all__, *HOOKS])
def test_every_name_of_the_plugin_contract_is_documented(name):
    """What a plugin may import, and the hooks."""
    assert name in DOCS


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_has_a_row(option):
    """In the table of options."""
    assert f"`{option}`" in (ROOT / "docs" / "options.md").read_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_row(preset):
    """In the table of presets."""
    assert f"| `{preset}` |" in (ROOT / "docs" / "options.md").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command):
    """As one would type it."""
    assert f"kvquant {command}" in DOCS


def test_the_plugin_contract_exports_what_the_architecture_says_and_nothing_else():
    """Widening it is a decision, not an accident."""
    assert set(kvquant.plugin.__all__) == {
        "hookimpl",
        "API_VERSION",
        "BackendSpec",
        "Requirement",
        "Capabilities",
        "Scheme",
        "Quantizer",
        "QuantizedRows",
        "Opaque",
        "Transform",
        "TransformSpec",
    }


def test_every_error_is_drawn_in_the_tree():
    """The tree at the top of the errors is complete."""
    raised = [name for name, thing in vars(errors).items() if isinstance(thing, type) and issubclass(thing, Exception)]
    missing = [name for name in raised if name not in (errors.__doc__ or "")]
    assert not missing

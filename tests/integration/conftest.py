"""What takes long, made once for all tests: an environment of its own, with kvquant and plugins as wheels."""

from __future__ import annotations

import pytest

from tests.integration.environment import ROOT, Environment, build_wheels


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A new virtual environment with kvquant installed from its wheel, and the example plugin's wheel at hand."""
    made = Environment(tmp_path_factory.mktemp("stranger"))
    build_wheels(made.wheels, ROOT, ROOT / "docs" / "plugins" / "kvquant-plugin-lloyd")
    made.pip("install", "kvquant")
    return made

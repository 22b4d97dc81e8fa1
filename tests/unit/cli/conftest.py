"""The command line in this process, with plugins on the path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from click.testing import CliRunner, Result

from kvquant import registry
from kvquant.cli.main import cli
from tests.plugins.on_path import plugins_on_path


@pytest.fixture
def kvquant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command: ``kvquant("info", "hqq")``."""
    for variable in (registry.BLOCK_VARIABLE, registry.ALLOW_VARIABLE, "KVQUANT_DEBUG", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    for variable in (registry.TRANSFORM_BLOCK_VARIABLE, registry.TRANSFORM_ALLOW_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    return lambda *arguments: CliRunner().invoke(cli, arguments, prog_name="kvquant")


@pytest.fixture
def install() -> Iterator[Callable[..., None]]:
    """Install folders of tests/plugins, or others: ``install("good", tmp_path)``."""
    with ExitStack() as stack:
        yield lambda *folders: stack.enter_context(plugins_on_path(*folders))

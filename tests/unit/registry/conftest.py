"""Real plugins on the path for the time of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from kvquant import registry
from tests.plugins.on_path import plugins_on_path


@pytest.fixture
def install() -> Iterator[Callable[..., None]]:
    """Install folders of tests/plugins, or others: ``install("good", tmp_path)``."""
    with ExitStack() as stack:
        yield lambda *folders: stack.enter_context(plugins_on_path(*folders))


@pytest.fixture
def installed() -> Callable[[str], list[registry.Backend]]:
    """Return the listed backends of a name."""
    return lambda name: [backend for backend in registry.list_backends() if backend.name == name]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (registry.BLOCK_VARIABLE, registry.ALLOW_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    for variable in (registry.TRANSFORM_BLOCK_VARIABLE, registry.TRANSFORM_ALLOW_VARIABLE):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    """Register backends that are gone after the test."""
    before = {backend.name for backend in registry.list_backends() if backend.distribution == registry.IN_PROCESS}
    yield registry.register
    for backend in registry.list_backends():
        if backend.distribution == registry.IN_PROCESS and backend.name not in before:
            registry.unregister(backend.name)

"""Puts the plugins of this folder on the path: real distributions with checked-in metadata, and no stand-ins."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvquant import registry

HERE = Path(__file__).parent


@contextmanager
def plugins_on_path(*folders: str | Path) -> Iterator[None]:
    """Install the distributions in `folders` for the time of the block, and forget what was imported of them.

    Args:
        folders: names of folders here, or paths of others.
    """
    paths = [str(HERE / folder) for folder in folders]
    sys.path[:0] = paths
    importlib.invalidate_caches()
    registry.refresh()
    try:
        yield
    finally:
        for path in paths:
            sys.path.remove(path)
        for name in [name for name in sys.modules if name.startswith("kvquant_test_")]:
            del sys.modules[name]
        registry.refresh()

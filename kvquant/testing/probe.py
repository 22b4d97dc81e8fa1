"""A fresh process that looks at one plugin: ``python -m kvquant.testing.probe ANSWER``, with a task in JSON as input.

What it finds goes to the file ANSWER, in JSON, so that all of its output is the plugin's. Importing this module imports
no torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kvquant import registry
from kvquant.errors import BackendUnavailableError
from kvquant.registry import Backend, TransformPlugin
from kvquant.registry.discovery import normalise_distribution
from kvquant.registry.guard import describe
from kvquant.testing.outcomes import CheckFailed

if TYPE_CHECKING:
    from torch import Tensor

_TIMEOUT = 300


def probe(task: str, **arguments: Any) -> dict[str, Any]:
    """Run a task in a fresh process, with the path of this one, and return what it found.

    Args:
        task: the name of a function below.
        arguments: its arguments, plain builtins.

    Returns:
        What the function returned, and under ``printed`` what came on standard output.

    Raises:
        CheckFailed: the process ended in another way, with the end of what it wrote.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(own_path())}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        try:
            # -P: nothing of the current directory may stand in for a module.
            done = subprocess.run(  # noqa: S603 # this very interpreter, this very module
                [sys.executable, "-P", "-m", "kvquant.testing.probe", str(answer)],
                input=json.dumps({"task": task, **arguments}),
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                env=environment,
                timeout=_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"a fresh process was not done after {_TIMEOUT} seconds") from None
        if not answer.exists():
            end = (done.stderr.strip() or done.stdout.strip())[-300:]
            raise CheckFailed(f"a fresh process ended with code {done.returncode}: {end}")
        found: dict[str, Any] = json.loads(answer.read_text())
    return {**found, "printed": done.stdout}


def own_path() -> list[str]:
    """Return where this process finds modules, without what a package has added from inside itself.

    setuptools adds its copies of other distributions once it is imported; a fresh process must begin without them.
    """
    sites = {"site-packages", "dist-packages"}
    return [entry for entry in sys.path if entry and not sites.intersection(Path(entry).parent.parts)]


# ------------------------------------------------------------------------------------------------ in that process


def listing(name: str, kind: str = "backend") -> dict[str, Any]:
    """Look a plugin up as ``kvquant list-backends`` or ``list-transforms`` does; return what that imported."""
    before = set(sys.modules)
    find: Callable[[str], Backend | TransformPlugin] = registry.find_backend
    if kind == "transform":
        find = registry.find_transform
    status = find(name).availability.status
    imported = {module.partition(".")[0] for module in set(sys.modules) - before}
    return {"imported": sorted(imported), "status": status}


def create(name: str, hidden: Sequence[str], scheme: dict[str, Any], *, dtype: str, device: str) -> dict[str, Any]:
    """Make a quantizer and quantise a few rows where the modules `hidden` are not installed.

    Returns:
        ``stage``: ``"done"``, or where it failed, ``"create"`` or ``"quantize"``; ``error``: in words; ``explained``:
        whether it is an error of kvquant's own; ``digest``: of the result.
    """
    import torch

    from kvquant.plugin.quantizer import Opaque
    from kvquant.plugin.spec import Scheme

    sys.meta_path[:] = [_Hider(list(sys.meta_path), frozenset(hidden))]
    for module in [module for module in sys.modules if module.partition(".")[0] in hidden]:
        del sys.modules[module]
    found: dict[str, Any] = {"stage": "create", "error": "", "explained": False, "digest": ""}
    rows = torch.randn(8, scheme["group_size"], generator=torch.Generator().manual_seed(0))
    try:
        quantizer = registry.get_backend(name).create(Scheme(**scheme))
        found["stage"] = "quantize"
        result = quantizer.quantize(rows.to(device, getattr(torch, dtype)))
        found["stage"] = "done"
    except BaseException as error:  # noqa: BLE001 # whatever it is, it is what was to be found out
        problem = getattr(error, "problem", describe(error))
        return found | {"error": problem, "explained": isinstance(error, BackendUnavailableError)}
    tensors = dict(result.tensors) if isinstance(result, Opaque) else {"codes": result.codes, "scale": result.scale}
    return found | {"digest": digest(tensors)}


def transform(name: str, head_dim: int, device: str) -> dict[str, Any]:
    """Apply a transform to a few rows, after other random numbers have been drawn.

    Returns:
        ``error``: in words; ``digest``: of the result.
    """
    import torch

    from kvquant.testing import data

    torch.seed()
    try:
        result = registry.get_transform(name).create(head_dim).apply(data.gaussian(16, head_dim).float().to(device))
    except BaseException as error:  # noqa: BLE001 # whatever it is, it is what was to be found out
        return {"error": getattr(error, "problem", describe(error)), "digest": ""}
    return {"error": "", "digest": digest({"states": result})}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of every bit of some tensors."""
    import torch

    seen = hashlib.sha256()
    for part in sorted(tensors):
        seen.update(part.encode() + bytes(tensors[part].cpu().contiguous().view(torch.uint8).flatten().tolist()))
    return seen.hexdigest()


def missing(name: str, distributions: Sequence[str]) -> dict[str, Any]:
    """Look the backend up where these distributions, by normalised name, are not installed."""
    version = importlib.metadata.version

    def without(distribution: str) -> str:
        if normalise_distribution(distribution) in distributions:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return version(distribution)

    importlib.metadata.version = without  # type: ignore[assignment]  # the name of its argument differs
    state = registry.find_backend(name).availability
    return {"status": state.status, "reason": state.reason, "hint": state.hint}


class _Hider:
    """Finds modules as before, all but some, as though they were not installed.

    Copies of them that another distribution carries along (setuptools does) are on a path of their own, which it adds
    later; those are found.
    """

    def __init__(self, finders: list[Any], hidden: Collection[str]) -> None:
        self._finders, self._hidden = finders, hidden
        self._path = set(sys.path)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec, or None; see `importlib.abc.MetaPathFinder`."""
        if path is None and name in self._hidden:
            return PathFinder.find_spec(name, [entry for entry in sys.path if entry not in self._path], target)
        for finder in self._finders:
            spec: ModuleSpec | None = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None

    def invalidate_caches(self) -> None:
        """Pass it on."""
        for finder in self._finders:
            if hasattr(finder, "invalidate_caches"):
                finder.invalidate_caches()

    def find_distributions(self, *arguments: Any, **keywords: Any) -> Any:
        """Pass it on: metadata of distributions stays as it is."""
        for finder in self._finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(*arguments, **keywords)


if __name__ == "__main__":
    _arguments = json.loads(sys.stdin.read())
    _tasks: dict[str, Callable[..., dict[str, Any]]] = {
        "listing": listing,
        "create": create,
        "missing": missing,
        "transform": transform,
    }
    Path(sys.argv[1]).write_text(json.dumps(_tasks[_arguments.pop("task")](**_arguments)))
    sys.stdout.flush()
    os._exit(0)  # whatever a plugin left running

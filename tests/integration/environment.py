"""A virtual environment as a user has one, made without a network.

What pip would download is seen through a folder of links to the packages of the environment that runs the tests;
kvquant itself and every plugin are left out of it, and come as wheels, through pip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

#: The libraries of the built-in backends.
LIBRARIES = ("hqq", "optimum-quanto", "bitsandbytes")


class Environment:
    """A new virtual environment with what kvquant depends on, and nothing else.

    Attributes:
        root: its folder.
        wheels: folder in which pip finds wheels.
        work: folder in which commands run.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "venv"
        self.wheels, self.work = root / "wheels", root / "work"
        self.work.mkdir()
        venv.create(self.root, with_pip=True)
        self._paths = sysconfig.get_paths("venv", {"base": str(self.root), "platbase": str(self.root)})
        libraries = {entry for name in LIBRARIES for entry in _entries(name)}
        link_packages(root / "dependencies", without=libraries | {"pip"} | _plugins())
        link_packages(root / "libraries", only=libraries)
        self._see("dependencies", root / "dependencies")
        self._libraries = root / "libraries"
        self._script("pytest", "import pytest; raise SystemExit(pytest.main())")
        # Python 3.11 puts an old one into new environments, before the one that torch is content with.
        self.pip("uninstall", "--yes", "setuptools")

    def run(self, *command: str | Path, cwd: Path | None = None, code: int | None = 0) -> str:
        """Run a command of the environment and return its standard output.

        Args:
            command: a console script's name, or a path, and its arguments.
            cwd: where to run it.
            code: the exit code that is expected; None for any.
        """
        return self._finished([Path(self._paths["scripts"]) / command[0], *command[1:]], cwd, code)

    def shell(self, commands: str, cwd: Path | None = None) -> str:
        """Run what one types into a shell in which the environment is active; stop at the first failure."""
        return self._finished(["bash", "-c", f"set -e\n{commands}"], cwd, 0)

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables: none that could lead pip or Python elsewhere."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PIP_", "PYTHON", "PYTEST_", "KVQUANT_"))
        }
        return kept | {
            "PATH": os.pathsep.join([self._paths["scripts"], kept.get("PATH", "")]),
            "VIRTUAL_ENV": str(self.root),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of: build with the tools that are here
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def pip(self, *arguments: str | Path) -> str:
        """Run pip."""
        return self.run("python", "-m", "pip", *arguments)

    def python(self, script: str) -> Any:
        """Run a script; return what it printed last, as JSON."""
        return json.loads(self.run("python", "-c", script).splitlines()[-1])

    def backends(self) -> dict[str, list[dict[str, Any]]]:
        """Return what ``kvquant list-backends`` says, by name."""
        found: dict[str, list[dict[str, Any]]] = {}
        for backend in json.loads(self.run("kvquant", "list-backends", "--json")):
            found.setdefault(backend["name"], []).append(backend)
        return found

    @contextmanager
    def installed(self, *distributions: str) -> Iterator[None]:
        """Have pip install distributions, by name, and uninstall them."""
        self.pip("install", *distributions)
        try:
            yield
        finally:
            self.pip("uninstall", "--yes", *distributions)

    @contextmanager
    def libraries(self) -> Iterator[None]:
        """Have the libraries of the built-in backends installed."""
        link = self._see("libraries", self._libraries)
        try:
            yield
        finally:
            link.unlink()

    def _finished(self, command: list[str | Path], cwd: Path | None, code: int | None) -> str:
        folder = cwd or self.work
        done = subprocess.run(command, cwd=folder, env=self.variables, capture_output=True, text=True, check=False)
        assert code in (None, done.returncode), f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _script(self, name: str, code: str) -> None:
        """Write a console script, which links to packages do not bring."""
        script = Path(self._paths["scripts"]) / name
        script.write_text(f"#!{Path(self._paths['scripts']) / 'python'}\n{code}\n")
        script.chmod(0o755)

    def _see(self, name: str, folder: Path) -> Path:
        link = Path(self._paths["purelib"]) / f"{name}.pth"
        link.write_text(f"{folder}\n")
        return link


def build_wheels(folder: Path, *sources: Path) -> None:
    """Build a wheel of each source folder, with the build tools of this environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", folder, *sources],
        env=environment | {"PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def link_packages(folder: Path, *, without: Iterable[str] = (), only: Iterable[str] | None = None) -> None:
    """Fill a folder with links to what is installed here.

    Args:
        folder: to be made.
        without: names of files and folders to leave out.
        only: names to take; None for all.
    """
    folder.mkdir()
    for site in dict.fromkeys(map(Path, sys.path)):
        if site.name not in ("site-packages", "dist-packages") or not site.is_dir():
            continue
        for entry in site.iterdir():
            wanted = entry.name not in without if only is None else entry.name in only
            if wanted and entry.suffix != ".pth" and entry.name != "__pycache__" and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)


def _plugins() -> set[str]:
    """Return the entries of kvquant and of every plugin that is installed here."""
    names = {entry.dist.name for entry in metadata.entry_points(group="kvquant.backends") if entry.dist}
    return {entry for name in {"kvquant", *names} for entry in _entries(name)} | {"kvquant", "kvquant_plugins"}


def _entries(distribution: str) -> set[str]:
    """Return the files and folders that a distribution has in site-packages."""
    return {file.parts[0] for file in metadata.files(distribution) or []} - {"..", "__pycache__"}

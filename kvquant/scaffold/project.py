"""A new plugin project: templates filled in, and written once nothing stands in the way."""

from __future__ import annotations

import json
import re
from pathlib import Path

from kvquant._version import __version__
from kvquant.errors import OptionValueError, ProjectFolderError
from kvquant.plugin.hookspecs import API_VERSION, BACKEND_GROUP
from kvquant.scaffold.names import Names, names_for

TEMPLATE = Path(__file__).with_name("template")

_PLACEHOLDER = re.compile(r"<<(\w+)>>")
_AUTHOR = re.compile(r"(?P<name>[^<>,]*[^<>,\s])\s*(?:<(?P<email>[^<>,\s]+@[^<>,\s]+)>)?")


def new_project(name: str, directory: str | Path = ".", format_: str = "affine", author: str = "") -> tuple[Path, ...]:
    """Write a plugin project that can be installed and tested as it is.

    Args:
        name: the backend's name, which users will write.
        directory: folder in which the project's own folder is made.
        format_: format of the quantiser to start from: ``"affine"``, ``"codebook"`` or ``"opaque"``.
        author: ``"A Name"`` or ``"A Name <name@example.org>"``; empty for none.

    Returns:
        The project's folder, then each file in it.

    Raises:
        PluginNameError: `name` cannot be the name of a backend, or (PluginNameTakenError) is taken.
        OptionValueError: `author` cannot be written into metadata.
        ProjectFolderError: the project's folder has something in it, or cannot be written.
    """
    names = names_for(name)
    folder = Path(directory) / names.distribution
    files = {folder / path: text for path, text in _files(names, format_, author).items()}
    obstacle = _obstacle(folder)
    if obstacle:
        raise ProjectFolderError(folder, obstacle)
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as cause:
        raise ProjectFolderError(folder, _reason(cause)) from cause
    return folder, *files


def _obstacle(folder: Path) -> str:
    try:
        return "it exists and is not empty" if any(folder.iterdir()) else ""
    except FileNotFoundError:
        return ""
    except OSError as cause:  # a file of that name, or a folder that may not be read
        return _reason(cause)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _files(names: Names, format_: str, author: str) -> dict[str, str]:
    """Return the text of every file by its path in the project."""
    values = {
        "backend": names.backend,
        "distribution": names.distribution,
        "package": names.package,
        "quantizer": names.quantizer,
        "format": format_,
        "group": BACKEND_GROUP,
        "api_version": str(API_VERSION),
        "kvquant_version": __version__,
        **_author(author, names),
    }
    sources = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        "LICENSE": "LICENSE",
        ".gitignore": "gitignore",
        ".github/workflows/test.yml": "test.yml",
        f"{names.package}/__init__.py": f"{format_}/__init__.py",
        f"{names.package}/quantizer.py": f"{format_}/quantizer.py",
        "tests/test_conformance.py": "test_conformance.py",
        "tests/test_quantizer.py": f"{format_}/test_quantizer.py",
    }
    return {path: _filled(source, values) for path, source in sources.items()}


def _filled(source: str, values: dict[str, str]) -> str:
    text = (TEMPLATE / f"{source}.in").read_text(encoding="utf-8")
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


def _author(author: str, names: Names) -> dict[str, str]:
    """Return the author as ``pyproject.toml`` wants it, and as the licence does."""
    if not author:
        author = f"The authors of {names.distribution}"
    match = _AUTHOR.fullmatch(author.strip())
    if match is None or not author.isprintable():
        raise OptionValueError(
            "author", author, "a name, or 'A Name <name@example.org>', on one line and without commas"
        )
    fields = {key: value for key, value in match.groupdict().items() if value}
    # A string of JSON is one of TOML, where all of it can be printed.
    entries = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())
    return {"authors": f"{{ {', '.join(entries)} }}", "holder": match["name"]}

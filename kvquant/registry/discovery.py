"""What is installed, from the metadata of distributions; imports nothing of theirs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from kvquant.plugin.hookspecs import BACKEND_GROUP, TRANSFORM_GROUP

_NAMELESS = "nameless-distribution"
_GROUPS = (BACKEND_GROUP, TRANSFORM_GROUP)


@dataclass(frozen=True)
class InstalledPlugin:
    """One entry point.

    Attributes:
        group: what it is an entry point for, e.g. ``"kvquant.backends"``.
        name: the backend's or transform's name, in lower case.
        value: what the entry point refers to, e.g. ``"my_package.backends"``.
        distribution: name of the distribution that declares it.
        version: version of that distribution, or an empty string where its metadata lacks one.
    """

    group: str
    name: str
    value: str
    distribution: str
    version: str


def normalise_distribution(name: str) -> str:
    """Return `name` as package indexes compare names: ``"My_Package"`` is ``"my-package"``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_plugins(group: str) -> list[InstalledPlugin]:
    """Return every entry point of a group of ours, duplicates included, sorted by name and distribution.

    A distribution that is on the path twice counts once, as it does for imports: the first hides the second. One whose
    metadata cannot be read is no reason to fail, and hides nothing but itself.
    """
    found: dict[str, list[InstalledPlugin]] = {}
    for distribution in metadata.distributions():
        # A search in the text first: parsing the entry points of all distributions takes several times longer.
        text = _entry_points_text(distribution)
        if any(ours in text for ours in _GROUPS):
            plugins = list(_plugins(distribution))
            if plugins:
                name = plugins[0].distribution
                found.setdefault(f"{len(found)}" if name == _NAMELESS else normalise_distribution(name), plugins)
    unique = {plugin for plugins in found.values() for plugin in plugins if plugin.group == group}
    return sorted(unique, key=lambda plugin: (plugin.name, plugin.distribution, plugin.value))


def _entry_points_text(distribution: metadata.Distribution) -> str:
    try:
        return distribution.read_text("entry_points.txt") or ""
    except (OSError, UnicodeError):
        return ""


def _plugins(distribution: metadata.Distribution) -> Iterator[InstalledPlugin]:
    name, version = _identity(distribution)
    section = ""
    # Read line by line, because the standard library's parser gives up on the whole file at the first bad line.
    for line in map(str.strip, _entry_points_text(distribution).splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif section in _GROUPS and line and not line.startswith(("#", ";")):
            plugin, _, value = line.partition("=")
            yield InstalledPlugin(section, plugin.strip().lower(), value.strip(), name, version)


def _identity(distribution: metadata.Distribution) -> tuple[str, str]:
    """Return name and version; metadata may be missing, or lack either."""
    try:
        fields = distribution.metadata
        return fields["Name"] or _NAMELESS, fields["Version"] or ""
    except Exception:  # noqa: BLE001 # what a missing file raises differs between versions of Python
        return _NAMELESS, ""

"""What is installed around a plugin: which distributions it may count on, and which modules they bring."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

from kvquant.registry.discovery import normalise_distribution

#: In every environment that a person installs packages in.
_ALWAYS = ("pip", "setuptools", "wheel")


def dependencies(distributions: Iterable[str]) -> set[str]:
    """Return these distributions and all that pip installs with them, by normalised name.

    Args:
        distributions: names, with extras where they have some: ``"kvquant[hqq]"``.
    """
    found: set[str] = set()
    waiting = [Requirement(name) for name in distributions]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        name, extras = normalise_distribution(wanted.name), frozenset(wanted.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found.add(name)
        waiting += _required(name, extras)
    return found


def _required(name: str, extras: frozenset[str]) -> list[Requirement]:
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    needed = []
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # old metadata; pip would not install it either
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
            needed.append(requirement)
    return needed


def modules_of(distributions: set[str]) -> set[str]:
    """Return the top-level modules that only these distributions, by normalised name, bring."""
    return {module for module, owners in _owners().items() if owners <= distributions}


def modules_beside(distributions: set[str]) -> set[str]:
    """Return the top-level modules that are installed, and that these distributions do not bring."""
    allowed = distributions | set(_ALWAYS)
    return {module for module, owners in _owners().items() if not owners & allowed}


def _owners() -> dict[str, set[str]]:
    """Return the distributions, by normalised name, that bring each top-level module."""
    return {
        module: {normalise_distribution(owner) for owner in owners}
        for module, owners in metadata.packages_distributions().items()
        if module not in sys.stdlib_module_names
    }

"""Which backends there are, from installed metadata alone: nothing is imported."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from kvquant.plugin.hookspecs import ENTRY_POINT_GROUP

#: Stands for a distribution where a backend was registered in-process.
IN_PROCESS = "in-process"


@dataclass(frozen=True)
class Candidate:
    """A backend that an installed distribution claims to have.

    Attributes:
        name: the entry point's name, in lower case: the backend's name.
        module: the module that holds the hook.
        distribution: who claims it.
        version: that distribution's version.
    """

    name: str
    module: str
    distribution: str
    version: str


def discover() -> list[Candidate]:
    """Return every entry point of the group, sorted by name and distribution.

    A distribution that is found twice on the path counts once, the first one, as it does for imports.
    """
    found: dict[tuple[str, str], Candidate] = {}
    for distribution in importlib.metadata.distributions():
        for entry in distribution.entry_points:
            if entry.group == ENTRY_POINT_GROUP:
                name = distribution.metadata["Name"] or "unknown"
                candidate = Candidate(entry.name.lower(), entry.value, name, distribution.version)
                found.setdefault((candidate.name, name.lower()), candidate)
    return [found[key] for key in sorted(found)]

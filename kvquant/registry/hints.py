"""Next steps for backends and transforms that are not installed.

Commands come from this table and never from what a user typed: whoever owns a misspelt name on a package index would
otherwise be one copy and paste away from running code on the user's machine.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

#: What brings each backend that kvquant knows of.
INSTALL_COMMANDS = {
    "bitsandbytes": "pip install 'kvquant[bitsandbytes]'",
    "hqq": "pip install 'kvquant[hqq]'",
    "lloydmax": "pip install kvquant",
    "quanto": "pip install 'kvquant[quanto]'",
    "reference": "pip install kvquant",
    "trellis": "pip install kvquant",
}

#: What else people call them, or what does the same, best first.
OTHER_NAMES = {
    "bnb": ("bitsandbytes",),
    "half-quadratic": ("hqq",),
    "kivi": ("reference",),
    "minmax": ("reference",),
    "optimum": ("quanto",),
    "optimum-quanto": ("quanto",),
    "optimum.quanto": ("quanto",),
    "optimum_quanto": ("quanto",),
    "turboquant": ("lloydmax", "trellis"),
}


@dataclass(frozen=True)
class Hints:
    """What kvquant knows of plugins of one kind, installed or not.

    Attributes:
        commands: what brings each that it knows of.
        other_names: what else people call them.
    """

    commands: Mapping[str, str] = field(default_factory=dict)
    other_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def suggest(self, name: str, installed: Iterable[str]) -> tuple[str, ...]:
        """Return what `name` may have been meant to be, closest first.

        Args:
            name: what was given, in lower case.
            installed: names of those installed, with or without ``"distribution:"`` before them.
        """
        if name in self.other_names:
            return self.other_names[name]
        known = {*installed, *self.commands} - {name}
        return tuple(difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.7))

    def install_command(self, names: Iterable[str], installed: Iterable[str]) -> str:
        """Return the command that brings the first of `names` that the table knows, or an empty string.

        Args:
            names: what was given, then what may have been meant.
            installed: names that need no command.
        """
        there = set(installed)
        for name in names:
            if name in there:
                return ""
            if name in self.commands:
                return self.commands[name]
        return ""

"""The names of a new plugin: one for users, and those of its distribution, package and class, which follow from it."""

from __future__ import annotations

import keyword
import re
import unicodedata
from dataclasses import dataclass

from kvquant.errors import PluginNameError, PluginNameTakenError
from kvquant.registry.discovery import InstalledPlugin, installed_plugins, normalise_distribution
from kvquant.registry.kinds import BACKEND, TRANSFORM

PREFIX = "kvquant-plugin-"
LONGEST = 30
RULE = f"a good name has at most {LONGEST} lower-case letters, digits and single hyphens, and starts with a letter"

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_KEYWORDS = {word.lower() for word in keyword.kwlist}


@dataclass(frozen=True)
class Names:
    """What a new plugin and its parts are called.

    Attributes:
        backend: what users write, e.g. ``"half-step"``.
    """

    backend: str

    @property
    def distribution(self) -> str:
        """What users install, e.g. ``"kvquant-plugin-half-step"``; also the name of the folder."""
        return PREFIX + self.backend

    @property
    def package(self) -> str:
        """What Python imports, e.g. ``"kvquant_plugin_half_step"``."""
        return self.distribution.replace("-", "_")

    @property
    def quantizer(self) -> str:
        """The class, e.g. ``"HalfStepQuantizer"``."""
        return "".join(part.capitalize() for part in self.backend.split("-")) + "Quantizer"


def names_for(name: str) -> Names:
    """Return the names of a plugin whose backend is called `name`.

    Args:
        name: what users will write.

    Raises:
        PluginNameError: it cannot be a name; the message says what a good one is and suggests one.
        PluginNameTakenError: an installed plugin, or a built-in one, has that name.
    """
    problem = _problem(name)
    if problem:
        raise PluginNameError(name, problem, _suggestion(name))
    owner = _owner(name)
    if owner:
        kind = BACKEND.name if owner.group == BACKEND.group else TRANSFORM.name
        raise PluginNameTakenError(name, owner.distribution, owner.version, _suggestion(name), kind)
    return Names(name)


def _problem(name: str) -> str:
    if f"{name}-".startswith("kvquant-"):
        return f"the prefix {PREFIX!r} is added to what you give"
    if not _NAME.fullmatch(name) or len(name) > LONGEST:
        return RULE
    if name in _KEYWORDS:
        return "it is a keyword of Python"
    return ""


def _owner(name: str) -> InstalledPlugin | None:
    """Return who has the name, as a plugin's or as a distribution's.

    Each of two distributions would hide the other, and so would each of two backends. A transform might share its name
    with a backend, but whoever says the name then has to say which one is meant.
    """
    for plugin in (*installed_plugins(BACKEND.group), *installed_plugins(TRANSFORM.group)):
        if plugin.name == name or normalise_distribution(plugin.distribution) == PREFIX + name:
            return plugin
    return None


def _suggestion(name: str) -> str:
    """Return a name that works, as close to `name` as it can be."""
    letters = unicodedata.normalize("NFKD", name.casefold()).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", letters).strip("-")
    words = re.sub(r"^kvquant(-plugin)?(-|$)", "", words)[:LONGEST].strip("-")
    if not words:
        words = "my-method"
    if words[0].isdigit():
        words = f"q{words}"
    while _problem(words) or _owner(words):
        words = f"my-{words}"[:LONGEST].strip("-")
    return words

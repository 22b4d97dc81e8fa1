"""What can be wrong with a plugin, whatever its kind: the messages, which each kind's own errors share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from kvquant.errors.base import KVQuantError, listing, origin


class AnyPluginError(KVQuantError):
    """Base of the errors about a plugin of some kind.

    Attributes:
        kind: ``"backend"`` or ``"transform"``.
        product: what its factory makes, in a word.
    """

    kind: ClassVar[str]
    product: ClassVar[str]


class UnknownPluginError(AnyPluginError, ValueError):
    """No installed plugin has that name.

    Attributes:
        name: what was given.
        installed: names of those that are installed.
        suggestions: names that are close to it.
        hint: a command from kvquant's own table that brings the plugin, or an empty string.
        advice: what to do, without naming what was given.
    """

    def __init__(self, name: str, installed: Iterable[str], suggestions: Iterable[str] = (), hint: str = "") -> None:
        self.name, self.installed, self.suggestions, self.hint = name, tuple(installed), tuple(suggestions), hint
        alike = f"Did you mean {' or '.join(map(repr, self.suggestions))}? " if self.suggestions else ""
        # The command comes last and bare, so that it can be copied.
        command = f" To install it: {hint}" if hint else ""
        self.advice = f"{alike}Installed: {listing(self.installed)}. Run 'kvquant list-{self.kind}s'.{command}"
        super().__init__(f"unknown {self.kind} {name!r}. {self.advice}")


class UnavailablePluginError(AnyPluginError, ImportError):
    """An installed plugin cannot be used.

    Attributes:
        status: why, in the word that listings have for it.
        name: the plugin's name.
        reason: why, as listings show it.
        hint: the next step.
    """

    status: ClassVar[str]

    def __init__(self, name: str, reason: str, hint: str, source: str = "") -> None:
        self.reason, self.hint = reason, hint
        whose = f", from {source}," if source else ""
        # The hint comes last and bare, so that a command in it can be copied.
        super().__init__(f"{self.kind} {name!r}{whose} cannot be used: {reason}. Next step: {hint}", name=name)


class DuplicatePluginError(UnavailablePluginError):
    """Several distributions provide a plugin of that name.

    Attributes:
        distributions: their names.
    """

    status = "duplicate"

    def __init__(self, name: str, distributions: Iterable[str]) -> None:
        self.distributions = tuple(distributions)
        choices = " or ".join(repr(f"{distribution}:{name}") for distribution in self.distributions)
        count, those = len(self.distributions), listing(self.distributions)
        super().__init__(
            name,
            f"{count} distributions provide a {self.kind} of that name: {those}",
            f"choose one by writing {choices}",
        )


class BlockedPluginError(UnavailablePluginError):
    """An environment variable forbids the plugin.

    Attributes:
        variable: the environment variable.
        value: its value.
        listed: whether the variable names the plugin (and so blocks it), or fails to name it among those allowed.
    """

    status = "blocked"

    def __init__(self, name: str, variable: str, value: str, *, listed: bool) -> None:
        self.variable, self.value, self.listed = variable, value, listed
        verb, step = ("names", "take it out of") if listed else ("does not name", "add it to")
        super().__init__(name, f"the environment's {variable}={value!r} {verb} it", f"{step} {variable}")


class BrokenPluginError(UnavailablePluginError):
    """A plugin fails to load.

    Attributes:
        distribution, version: where the plugin comes from.
        problem: what is wrong, on one line.
        details: the plugin's own traceback, where it raised; Python shows it with this error's.
    """

    status = "broken"

    def __init__(
        self, name: str, distribution: str, version: str, problem: str, details: str = "", hint: str = ""
    ) -> None:
        self.distribution, self.version, self.problem, self.details = distribution, version, problem, details
        super().__init__(
            name,
            problem,
            hint or f"upgrade {distribution}, or report this to its author",
            origin(distribution, version),
        )
        if details:
            self.add_note(f"The plugin's own traceback:\n{details.rstrip()}")


class IncompatiblePluginError(BrokenPluginError):
    """A plugin was written for another version of the plugin API.

    Attributes:
        plugin_api: the version that the plugin was written for.
        supported_api: the version that this kvquant has.
    """

    status = "incompatible"

    def __init__(self, name: str, distribution: str, version: str, plugin_api: int, supported_api: int) -> None:
        self.plugin_api, self.supported_api = plugin_api, supported_api
        super().__init__(
            name,
            distribution,
            version,
            f"it was written for version {plugin_api} of the plugin API, and this kvquant has version {supported_api}",
            hint=f"upgrade {'kvquant' if plugin_api > supported_api else distribution}",
        )


class PluginImportError(UnavailablePluginError):
    """What a plugin makes failed to import, or a library that it needs; that error is the `__cause__`.

    Attributes:
        distribution, version: where the plugin comes from.
        factory: what was being imported.
        problem: what went wrong, on one line.
    """

    status = "broken"

    def __init__(self, name: str, distribution: str, version: str, factory: str, problem: str) -> None:
        self.distribution, self.version, self.factory, self.problem = distribution, version, factory, problem
        super().__init__(
            name,
            f"importing its {self.product} {factory!r} failed: {problem}",
            f"upgrade {distribution} and what it needs, or report this to its author",
            origin(distribution, version),
        )


class PluginFactoryError(AnyPluginError, RuntimeError):
    """A plugin's factory raised; its own error is the `__cause__`.

    Attributes:
        name: the plugin's name.
        distribution, version: where it comes from.
        problem: what went wrong, on one line.
    """

    def __init__(self, name: str, distribution: str, version: str, asked: object, problem: str) -> None:
        self.name, self.distribution, self.version, self.problem = name, distribution, version, problem
        super().__init__(
            f"{self.kind} {name!r}, from {origin(distribution, version)}, could not make a {self.product} for {asked}: "
            f"{problem}"
        )


class PluginSpecError(AnyPluginError, ValueError):
    """A declaration cannot work; nothing was registered.

    Attributes:
        subject: the declaration, e.g. ``"backend 'mine'"``.
        problems: one sentence for each thing that is wrong.
    """

    def __init__(self, subject: str, problems: Sequence[str]) -> None:
        self.subject, self.problems = subject, tuple(problems)
        super().__init__(f"{subject} cannot be registered: {'; '.join(self.problems)}.")


class PluginExistsError(AnyPluginError, ValueError):
    """A plugin was registered under a name that is taken.

    Attributes:
        name: the name.
        distribution: who has it.
    """

    def __init__(self, name: str, distribution: str) -> None:
        self.name, self.distribution = name, distribution
        super().__init__(
            f"there is a {self.kind} {name!r} already, from {distribution}. Choose another name, or pass replace=True "
            "to put yours in its place."
        )


class PluginNotRegisteredError(AnyPluginError, ValueError):
    """A plugin was unregistered that had not been registered in this process.

    Attributes:
        name: the name.
        registered: names that could be unregistered.
    """

    def __init__(self, name: str, registered: Iterable[str]) -> None:
        self.name, self.registered = name, tuple(registered)
        super().__init__(
            f"{self.kind} {name!r} was not registered in this process, so it cannot be unregistered. "
            f"Registered: {listing(self.registered)}."
        )

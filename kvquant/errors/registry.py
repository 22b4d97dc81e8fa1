"""Backends that cannot be found, declared or used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvquant.errors.base import KVQuantError, listing, origin


class BackendError(KVQuantError):
    """A backend, or the declaration of one, is not what was hoped for."""


class UnknownBackendError(BackendError, ValueError):
    """No installed backend has that name.

    Attributes:
        name: what was given.
        installed: names of the installed backends.
        suggestions: names that are close to it.
        hint: a command from kvquant's own table that brings the backend, or an empty string.
    """

    def __init__(self, name: str, installed: Iterable[str], suggestions: Iterable[str] = (), hint: str = "") -> None:
        self.name, self.installed, self.suggestions, self.hint = name, tuple(installed), tuple(suggestions), hint
        alike = f" Did you mean {' or '.join(map(repr, self.suggestions))}?" if self.suggestions else ""
        # The command comes last and bare, so that it can be copied.
        command = f" To install it: {hint}" if hint else ""
        super().__init__(
            f"unknown backend {name!r}.{alike} Installed: {listing(self.installed)}. "
            f"Run 'kvquant list-backends'.{command}"
        )


class BackendUnavailableError(BackendError, ImportError):
    """An installed backend cannot be used.

    Attributes:
        name: the backend's name.
        reason: why, as ``kvquant list-backends`` shows it.
        hint: the next step.
    """

    def __init__(self, name: str, reason: str, hint: str, source: str = "") -> None:
        self.reason, self.hint = reason, hint
        whose = f", from {source}," if source else ""
        # The hint comes last and bare, so that a command in it can be copied.
        super().__init__(f"backend {name!r}{whose} cannot be used: {reason}. Next step: {hint}", name=name)


class DuplicateBackendError(BackendUnavailableError):
    """Several distributions provide a backend of that name.

    Attributes:
        distributions: their names.
    """

    def __init__(self, name: str, distributions: Iterable[str]) -> None:
        self.distributions = tuple(distributions)
        choices = " or ".join(repr(f"{distribution}:{name}") for distribution in self.distributions)
        super().__init__(
            name,
            f"{len(self.distributions)} distributions provide a backend of that name: {listing(self.distributions)}",
            f"choose one by writing {choices}",
        )


class BlockedBackendError(BackendUnavailableError):
    """An environment variable forbids the backend.

    Attributes:
        variable: the environment variable.
        value: its value.
        listed: whether the variable names the backend (and so blocks it), or fails to name it among those allowed.
    """

    def __init__(self, name: str, variable: str, value: str, *, listed: bool) -> None:
        self.variable, self.value, self.listed = variable, value, listed
        verb, step = ("names", "take it out of") if listed else ("does not name", "add it to")
        super().__init__(name, f"the environment's {variable}={value!r} {verb} it", f"{step} {variable}")


class BrokenBackendError(BackendUnavailableError):
    """A plugin fails to load.

    Attributes:
        distribution, version: where the plugin comes from.
        problem: what is wrong, on one line.
        details: the plugin's own traceback, where it raised; Python shows it with this error's.
    """

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


class IncompatibleBackendError(BrokenBackendError):
    """A plugin was written for another version of the plugin API.

    Attributes:
        plugin_api: the version that the plugin was written for.
        supported_api: the version that this kvquant has.
    """

    def __init__(self, name: str, distribution: str, version: str, plugin_api: int, supported_api: int) -> None:
        self.plugin_api, self.supported_api = plugin_api, supported_api
        super().__init__(
            name,
            distribution,
            version,
            f"it was written for version {plugin_api} of the plugin API, and this kvquant has version {supported_api}",
            hint=f"upgrade {'kvquant' if plugin_api > supported_api else distribution}",
        )


class MissingRequirementError(BackendUnavailableError):
    """A distribution that the backend needs is not installed.

    Attributes:
        requirements: all that stands in the way, as ``(requirement, installed version or None)``.
    """

    def __init__(self, name: str, requirements: Iterable[tuple[str, str | None]], hint: str) -> None:
        self.requirements = tuple(requirements)
        unmet = [
            f"{requirement} ({'not installed' if installed is None else f'{installed} is installed'})"
            for requirement, installed in self.requirements
        ]
        super().__init__(name, f"it needs {listing(unmet)}", hint)


class OutdatedRequirementError(MissingRequirementError):
    """Every distribution that the backend needs is installed, but not all of them recent enough."""


class BackendImportError(BackendUnavailableError):
    """A backend's quantizer failed to import, or a library that it needs; that error is the `__cause__`.

    Attributes:
        distribution, version: where the plugin comes from.
        factory: what was being imported.
        problem: what went wrong, on one line.
    """

    def __init__(self, name: str, distribution: str, version: str, factory: str, problem: str) -> None:
        self.distribution, self.version, self.factory, self.problem = distribution, version, factory, problem
        super().__init__(
            name,
            f"importing its quantizer {factory!r} failed: {problem}",
            f"upgrade {distribution} and what it needs, or report this to its author",
            origin(distribution, version),
        )


class BackendFactoryError(BackendError, RuntimeError):
    """A backend's factory raised; its own error is the `__cause__`.

    Attributes:
        name: the backend's name.
        distribution, version: where the plugin comes from.
        scheme: what was asked for.
        problem: what went wrong, on one line.
    """

    def __init__(self, name: str, distribution: str, version: str, scheme: object, problem: str) -> None:
        self.name, self.distribution, self.version = name, distribution, version
        self.scheme, self.problem = scheme, problem
        super().__init__(
            f"backend {name!r}, from {origin(distribution, version)}, could not make a quantizer for {scheme}: "
            f"{problem}"
        )


class BackendSpecError(BackendError, ValueError):
    """A backend's declaration cannot work; nothing was registered.

    Attributes:
        subject: the declaration, e.g. ``"backend 'mine'"``.
        problems: one sentence for each thing that is wrong.
    """

    def __init__(self, subject: str, problems: Sequence[str]) -> None:
        self.subject, self.problems = subject, tuple(problems)
        super().__init__(f"{subject} cannot be registered: {'; '.join(self.problems)}.")


class BackendExistsError(BackendError, ValueError):
    """A backend was registered under a name that is taken.

    Attributes:
        name: the name.
        distribution: who has it.
    """

    def __init__(self, name: str, distribution: str) -> None:
        self.name, self.distribution = name, distribution
        super().__init__(
            f"there is a backend {name!r} already, from {distribution}. Choose another name, or pass replace=True to "
            "put yours in its place."
        )


class BackendNotRegisteredError(BackendError, ValueError):
    """A backend was unregistered that had not been registered in this process.

    Attributes:
        name: the name.
        registered: names that could be unregistered.
    """

    def __init__(self, name: str, registered: Iterable[str]) -> None:
        self.name, self.registered = name, tuple(registered)
        super().__init__(
            f"backend {name!r} was not registered in this process, so it cannot be unregistered. "
            f"Registered: {listing(self.registered)}."
        )

"""Every error that kvquant raises, with its message, in one place.

Each is also a natural builtin, so that code which knows nothing of kvquant can catch it, and carries its parts as
attributes, so that code need not parse text::

    KVQuantError
    ├── ConfigError (ValueError)            an option, before anything runs
    │   ├── UnknownOptionError              a misspelt option or preset
    │   ├── OptionValueError                a value that can never work
    │   └── UnsupportedError                a value that this backend or model cannot do
    ├── BackendError                        a backend, or the declaration of one
    │   ├── UnknownBackendError (ValueError)        no installed backend has that name
    │   ├── BackendUnavailableError (ImportError)   there is one, and it cannot be used
    │   │   ├── DuplicateBackendError       several distributions provide it
    │   │   ├── BlockedBackendError         an environment variable forbids it
    │   │   ├── BrokenBackendError          its plugin fails to load
    │   │   │   └── IncompatibleBackendError    ... being written for another plugin API
    │   │   ├── MissingRequirementError     a distribution that it needs is not installed
    │   │   │   └── OutdatedRequirementError    ... or is too old
    │   │   └── BackendImportError          its quantizer fails to import
    │   ├── BackendFactoryError (RuntimeError)      its factory raised
    │   ├── BackendSpecError (ValueError)           a declaration that cannot work
    │   ├── BackendExistsError (ValueError)         registered under a name that is taken
    │   └── BackendNotRegisteredError (ValueError)  unregistered without having been registered
    ├── StatesError (ValueError)            key and value states that do not fit the cache
    │   └── NonFiniteStatesError            NaN or infinity in them
    ├── CropError (ValueError)              a crop that the cache cannot do
    ├── BackendContractError (TypeError)    a plugin returned something else than it promised
    ├── QuantizationError (RuntimeError)    a plugin raised while quantising or dequantising
    ├── StaleStatesError (RuntimeError)     states read after the cache behind them has changed
    ├── ReadOnlyStatesError (RuntimeError)  states written to
    ├── ModelLoadError (OSError)            a model that could not be loaded
    └── PendingAssignmentError (RuntimeError)  keys were assigned, and values that fit them were not
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class KVQuantError(Exception):
    """Base of every error that kvquant raises on purpose."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of `known`, or an empty string."""
    matches = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=3, cutoff=0.7)
    if not matches:
        return ""
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?"


def origin(distribution: str, version: str) -> str:
    """Return ``"kvquant-plugin-foo 1.2"``, or the distribution alone where there is no version."""
    return f"{distribution} {version}".rstrip()


def listing(items: Iterable[object]) -> str:
    """Return ``"a, b, c"``, or ``"none"`` when there are none."""
    return ", ".join(map(str, items)) or "none"


# ------------------------------------------------------------------------------------------------ configuration


class ConfigError(KVQuantError, ValueError):
    """An option that cannot be honoured; raised before anything runs."""


class UnknownOptionError(ConfigError):
    """A name that is not an option (or not a preset, a layer, ...).

    Attributes:
        kind: what was looked for, e.g. ``"option"`` or ``"preset"``.
        name: what was given.
        known: what would have worked.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, tuple(known)
        super().__init__(
            f"unknown {kind} {name!r}.{did_you_mean(name, self.known)} Known {kind}s: {listing(self.known)}."
        )


class OptionValueError(ConfigError):
    """A value that can never work for an option.

    Attributes:
        option: the option's name, with its layer where it has one.
        value: what was given.
        expected: what would work, in words.
    """

    def __init__(self, option: str, value: object, expected: str) -> None:
        self.option, self.value, self.expected = option, value, expected
        super().__init__(f"{option}={value!r} cannot work: expected {expected}.")


class UnsupportedError(ConfigError):
    """A combination that a backend or a model cannot do.

    Attributes:
        subject: who cannot, e.g. ``"backend 'hqq'"``.
        where: the layer and stream concerned, or an empty string.
        reasons: one sentence for each thing that stands in the way.
    """

    def __init__(self, subject: str, reasons: Sequence[str], where: str = "") -> None:
        self.subject, self.reasons, self.where = subject, tuple(reasons), where
        place = f" for {where}" if where else ""
        super().__init__(f"{subject} cannot be used{place}: {'; '.join(self.reasons)}.")


# ------------------------------------------------------------------------------------------------ registry


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


# ------------------------------------------------------------------------------------------------ states and cache


class StatesError(KVQuantError, ValueError):
    """Key or value states that do not fit; nothing was stored.

    Attributes:
        where: ``"layer 3"``, or an empty string when the layer is not known.
        problem: what is wrong with them.
    """

    def __init__(self, problem: str, where: str = "") -> None:
        self.problem, self.where = problem, where
        super().__init__(f"{where + ': ' if where else ''}{problem}; nothing was stored.")


class NonFiniteStatesError(StatesError):
    """NaN or infinity among the states that were about to be quantised.

    Attributes:
        stream: ``"key"`` or ``"value"``.
        start, stop: the range of tokens, counted from the start of the sequence, in which they are.
    """

    def __init__(self, stream: str, start: int, stop: int, where: str = "") -> None:
        self.stream, self.start, self.stop = stream, start, stop
        super().__init__(
            f"{stream} states hold NaN or infinity among tokens {start} to {stop - 1} "
            "(check_finite=False switches this check off)",
            where,
        )


class CropError(KVQuantError, ValueError):
    """A crop that cannot be done.

    Attributes:
        requested: the argument of `crop`.
        length: tokens in the cache.
    """

    def __init__(self, requested: int, length: int) -> None:
        self.requested, self.length = requested, length
        if requested > 0:
            problem = f"crop takes the number of tokens to remove as a negative number, for example crop(-{requested})"
        else:
            problem = f"the cache holds only {length} tokens; at most crop({-length}) is possible"
        super().__init__(f"crop({requested}): {problem}. Nothing was removed.")


class QuantizationError(KVQuantError, RuntimeError):
    """A backend raised while it quantised or dequantised; its own error is the `__cause__`.

    Attributes:
        backend: the backend's name.
        stream: ``"key"`` or ``"value"``.
        start, stop: the tokens of the block, counted from the start of the sequence.
        where: the layer, e.g. ``"layer 3"``.
    """

    def __init__(self, backend: str, stream: str, start: int, stop: int, cause: Exception, where: str = "") -> None:
        self.backend, self.stream, self.start, self.stop, self.where = backend, stream, start, stop, where
        place = f"{where}, " if where else ""
        super().__init__(
            f"backend {backend!r} failed on {place}{stream} states of tokens {start} to {stop - 1}: "
            f"{type(cause).__name__}: {cause}. The cache holds every token that it held before this update."
        )


class BackendContractError(KVQuantError, TypeError):
    """A backend returned something other than the plugin contract promises.

    Attributes:
        backend: the backend's name.
        problem: what is wrong with what it returned.
    """

    def __init__(self, backend: str, problem: str) -> None:
        self.backend, self.problem = backend, problem
        super().__init__(
            f"backend {backend!r} broke the plugin contract: {problem}. This is a bug in the plugin, not in your code."
        )


class StaleStatesError(KVQuantError, RuntimeError):
    """States were read after the cache that they stand for has changed.

    Attributes:
        stream: ``"key"`` or ``"value"``.
    """

    def __init__(self, stream: str) -> None:
        self.stream = stream
        super().__init__(
            f"these {stream} states stand for the cache as it was before its last change, and it keeps no history. "
            "Take a copy while they are fresh: states.clone()."
        )


class ReadOnlyStatesError(KVQuantError, RuntimeError):
    """States that stand for a quantised cache were written to.

    Attributes:
        operation: the name of the operation.
    """

    def __init__(self, operation: str) -> None:
        self.operation = operation
        super().__init__(
            f"{operation} would write into quantised states, which are read only. Work on a copy (states.clone()), "
            "and assign cache.layers[i].keys or .values to change the cache."
        )


class PendingAssignmentError(KVQuantError, RuntimeError):
    """Keys (or values) of another length were assigned, and their partner has not followed yet.

    Attributes:
        assigned: the stream that was assigned.
        length: its tokens.
        partner_length: tokens of the other stream.
    """

    def __init__(self, assigned: str, length: int, partner_length: int) -> None:
        self.assigned, self.length, self.partner_length = assigned, length, partner_length
        partner = {"key": "values", "value": "keys"}[assigned]
        super().__init__(
            f"the {assigned} states of this layer were assigned with {length} tokens, but its {partner} still hold "
            f"{partner_length}. Assign {partner} of {length} tokens first."
        )


class ModelLoadError(KVQuantError, OSError):
    """A model or its tokenizer could not be loaded; the library's own error is the `__cause__`.

    Attributes:
        name: the name or path given.
    """

    def __init__(self, name: str, cause: Exception) -> None:
        self.name = name
        first = str(cause).strip().partition("\n")[0]
        super().__init__(
            f"cannot load the model {name!r}: {first} Give the folder of a saved model, or the name of one on the hub."
        )

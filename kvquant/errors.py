"""Every error that kvquant raises, with its message, in one place.

Each is also a natural builtin, so that code which knows nothing of kvquant can catch it, and carries its parts as
attributes, so that code need not parse text::

    KVQuantError
    ├── ConfigError (ValueError)            an option, before anything runs
    │   ├── UnknownOptionError              a misspelt option or preset
    │   ├── OptionValueError                a value that can never work
    │   └── UnsupportedError                a value that this backend or model cannot do
    ├── UnknownBackendError (LookupError)   no backend of that name
    ├── DuplicateBackendError (LookupError) two distributions have a backend of that name
    ├── BackendUnavailableError (ImportError)  a backend that cannot be used here
    ├── PluginError (RuntimeError)          a plugin that does not fit the plugin contract, or fails at import
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


class UnknownBackendError(KVQuantError, LookupError):
    """There is no backend of that name.

    Attributes:
        name: what was asked for.
        installed: the names that there are.
        hint: how to install it, for backends that we know; never made from `name`.
    """

    def __init__(self, name: str, installed: Sequence[str], hint: str = "") -> None:
        self.name, self.installed, self.hint = name, tuple(installed), hint
        install = f" It is not installed: {hint}." if hint else did_you_mean(name, installed)
        super().__init__(
            f"unknown backend {name!r}.{install} Installed: {listing(installed)}. Run 'kvquant list-backends'."
        )


class DuplicateBackendError(KVQuantError, LookupError):
    """A name that more than one distribution claims, or that is taken.

    Attributes:
        name: the name.
        distributions: who claims it.
    """

    def __init__(self, name: str, distributions: Sequence[str]) -> None:
        self.name, self.distributions = name, tuple(distributions)
        if len(self.distributions) > 1 and "in-process" not in self.distributions:
            choices = " or ".join(repr(f"{distribution}:{name}") for distribution in self.distributions)
            advice = f"Choose with {choices}, or uninstall one"
        elif len(self.distributions) > 1:
            advice = f"Register it under another name; {name!r} is installed already"
        else:
            advice = "Register it under another name, or with replace=True"
        super().__init__(f"backend {name!r} is claimed by {' and '.join(self.distributions)}. {advice}.")


class BackendUnavailableError(KVQuantError, ImportError):
    """A backend that is known and cannot be used here.

    Attributes:
        name: the backend.
        status: ``"missing"``, ``"incompatible"``, ``"broken"``, ``"blocked"`` or ``"duplicate"``.
        reason: why.
        hint: what to do about it; may be empty.
    """

    def __init__(self, name: str, status: str, reason: str, hint: str = "") -> None:
        self.status, self.reason, self.hint = status, reason, hint
        advice = f" To mend it: {hint}." if hint else ""
        super().__init__(f"backend {name!r} cannot be used ({status}): {reason}.{advice}", name=name)


class PluginError(KVQuantError, RuntimeError):
    """A plugin that does not fit the plugin contract or fails at import. The text says which and why."""


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

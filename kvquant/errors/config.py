"""Options that cannot be honoured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvquant.errors.base import KVQuantError, did_you_mean, listing


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

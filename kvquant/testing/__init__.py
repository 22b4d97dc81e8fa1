"""The conformance kit: what a backend or a transform owes the core, checked on the plugin itself.

On the command line, for a backend that is installed::

    kvquant check-plugin foo
    pytest --pyargs kvquant.testing --kvquant-backend foo

In the plugin's own tests::

    from kvquant.testing import parametrize_checks

    @parametrize_checks("foo")
    def test_conforms(check):
        check()

And anywhere else, also for a `BackendSpec` that is not installed: ``check_backend(spec).raise_for_failures()``.

The same for a transform: ``--kvquant-transform``, `parametrize_transform_checks` and `check_transform`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvquant.testing.outcomes import CheckFailed, Outcome, Report, TransformReport
    from kvquant.testing.pytest_support import parametrize_checks, parametrize_transform_checks
    from kvquant.testing.runner import check_backend
    from kvquant.testing.transforms.runner import check_transform

__all__ = [
    "CheckFailed",
    "Outcome",
    "Report",
    "TransformReport",
    "check_backend",
    "check_transform",
    "parametrize_checks",
    "parametrize_transform_checks",
]

_HOMES = {
    "CheckFailed": "kvquant.testing.outcomes",
    "Outcome": "kvquant.testing.outcomes",
    "Report": "kvquant.testing.outcomes",
    "TransformReport": "kvquant.testing.outcomes",
    "check_backend": "kvquant.testing.runner",
    "check_transform": "kvquant.testing.transforms.runner",
    "parametrize_checks": "kvquant.testing.pytest_support",
    "parametrize_transform_checks": "kvquant.testing.pytest_support",
}


def __getattr__(name: str) -> object:
    # Lazily, because pytest imports this package at the start of every run, to learn the kit's options.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value

"""The text of the registry's errors, word for word, and what they can be caught as."""

from __future__ import annotations

import pytest

from kvquant import errors
from kvquant.errors.plugins import AnyPluginError

BUILTINS = {
    errors.UnknownBackendError: ValueError,
    errors.DuplicateBackendError: ImportError,
    errors.BlockedBackendError: ImportError,
    errors.BrokenBackendError: ImportError,
    errors.IncompatibleBackendError: errors.BrokenBackendError,
    errors.MissingRequirementError: ImportError,
    errors.OutdatedRequirementError: errors.MissingRequirementError,
    errors.BackendImportError: ImportError,
    errors.BackendFactoryError: RuntimeError,
    errors.BackendSpecError: ValueError,
    errors.BackendExistsError: ValueError,
    errors.BackendNotRegisteredError: ValueError,
    errors.UnknownTransformError: ValueError,
    errors.DuplicateTransformError: ImportError,
    errors.BlockedTransformError: ImportError,
    errors.BrokenTransformError: ImportError,
    errors.IncompatibleTransformError: errors.BrokenTransformError,
    errors.TransformImportError: ImportError,
    errors.HeadDimError: ValueError,
    errors.TransformFactoryError: RuntimeError,
    errors.TransformFailedError: RuntimeError,
    errors.TransformContractError: TypeError,
    errors.TransformSpecError: ValueError,
    errors.TransformExistsError: ValueError,
    errors.TransformNotRegisteredError: ValueError,
}

#: What the others are caught as.
BASES = {
    errors.BackendError,
    errors.BackendUnavailableError,
    errors.TransformError,
    errors.TransformUnavailableError,
}

TEXTS = [
    (
        errors.UnknownBackendError("hqqq", ["bitsandbytes", "hqq", "quanto", "reference"], ["hqq"]),
        (
            "unknown backend 'hqqq'. Did you mean 'hqq'? Installed: bitsandbytes, hqq, quanto, reference. "
            "Run 'kvquant list-backends'."
        ),
    ),
    (
        errors.UnknownBackendError("x", [], ["y", "z"]),
        "unknown backend 'x'. Did you mean 'y' or 'z'? Installed: none. Run 'kvquant list-backends'.",
    ),
    (
        errors.UnknownBackendError("hqq", ["reference"], hint="pip install 'kvquant[hqq]'"),
        (
            "unknown backend 'hqq'. Installed: reference. Run 'kvquant list-backends'. "
            "To install it: pip install 'kvquant[hqq]'"
        ),
    ),
    (
        errors.DuplicateBackendError("hqq", ["kvquant", "other"]),
        (
            "backend 'hqq' cannot be used: 2 distributions provide a backend of that name: kvquant, other. "
            "Next step: choose one by writing 'kvquant:hqq' or 'other:hqq'"
        ),
    ),
    (
        errors.BlockedBackendError("hqq", "KVQUANT_BLOCK_BACKENDS", "a,hqq", listed=True),
        (
            "backend 'hqq' cannot be used: the environment's KVQUANT_BLOCK_BACKENDS='a,hqq' names it. "
            "Next step: take it out of KVQUANT_BLOCK_BACKENDS"
        ),
    ),
    (
        errors.BlockedBackendError("hqq", "KVQUANT_LOAD_BACKENDS", "a", listed=False),
        (
            "backend 'hqq' cannot be used: the environment's KVQUANT_LOAD_BACKENDS='a' does not name it. "
            "Next step: add it to KVQUANT_LOAD_BACKENDS"
        ),
    ),
    (
        errors.BrokenBackendError("foo", "kvquant-foo", "1.2", "it is broken"),
        (
            "backend 'foo', from kvquant-foo 1.2, cannot be used: it is broken. "
            "Next step: upgrade kvquant-foo, or report this to its author"
        ),
    ),
    (
        errors.IncompatibleBackendError("foo", "kvquant-foo", "1.2", 2, 1),
        (
            "backend 'foo', from kvquant-foo 1.2, cannot be used: it was written for version 2 of the plugin API, and "
            "this kvquant has version 1. Next step: upgrade kvquant"
        ),
    ),
    (
        errors.IncompatibleBackendError("foo", "kvquant-foo", "", 1, 2),
        (
            "backend 'foo', from kvquant-foo, cannot be used: it was written for version 1 of the plugin API, and this "
            "kvquant has version 2. Next step: upgrade kvquant-foo"
        ),
    ),
    (
        errors.MissingRequirementError("hqq", [("hqq>=0.2", None), ("torch>=9", "2.13")], "pip install 'kvquant[hqq]'"),
        (
            "backend 'hqq' cannot be used: it needs hqq>=0.2 (not installed), torch>=9 (2.13 is installed). "
            "Next step: pip install 'kvquant[hqq]'"
        ),
    ),
    (
        errors.OutdatedRequirementError("hqq", [("hqq>=0.2", "0.1")], "pip install 'kvquant[hqq]'"),
        "backend 'hqq' cannot be used: it needs hqq>=0.2 (0.1 is installed). Next step: pip install 'kvquant[hqq]'",
    ),
    (
        errors.BackendImportError("foo", "kvquant-foo", "1.2", "foo:Foo", "ImportError: no"),
        (
            "backend 'foo', from kvquant-foo 1.2, cannot be used: importing its quantizer 'foo:Foo' failed: "
            "ImportError: no. Next step: upgrade kvquant-foo and what it needs, or report this to its author"
        ),
    ),
    (
        errors.BackendFactoryError("foo", "kvquant-foo", "1.2", "SCHEME", "ValueError: no"),
        "backend 'foo', from kvquant-foo 1.2, could not make a quantizer for SCHEME: ValueError: no",
    ),
    (
        errors.BackendSpecError("backend 'X'", ["this is wrong", "that is wrong"]),
        "backend 'X' cannot be registered: this is wrong; that is wrong.",
    ),
    (
        errors.BackendExistsError("hqq", "kvquant"),
        (
            "there is a backend 'hqq' already, from kvquant. Choose another name, or pass replace=True to put yours "
            "in its place."
        ),
    ),
    (
        errors.BackendNotRegisteredError("hqq", ["mine", "yours"]),
        "backend 'hqq' was not registered in this process, so it cannot be unregistered. Registered: mine, yours.",
    ),
    (
        errors.UnknownTransformError("hadamart", ["hadamard", "random"], ["hadamard"]),
        (
            "unknown transform 'hadamart'. Did you mean 'hadamard'? Installed: hadamard, random. "
            "Run 'kvquant list-transforms'."
        ),
    ),
    (
        errors.DuplicateTransformError("mix", ["one", "other"]),
        (
            "transform 'mix' cannot be used: 2 distributions provide a transform of that name: one, other. "
            "Next step: choose one by writing 'one:mix' or 'other:mix'"
        ),
    ),
    (
        errors.BlockedTransformError("mix", "KVQUANT_BLOCK_TRANSFORMS", "mix", listed=True),
        (
            "transform 'mix' cannot be used: the environment's KVQUANT_BLOCK_TRANSFORMS='mix' names it. "
            "Next step: take it out of KVQUANT_BLOCK_TRANSFORMS"
        ),
    ),
    (
        errors.BrokenTransformError("mix", "kvquant-mix", "1.2", "it is broken"),
        (
            "transform 'mix', from kvquant-mix 1.2, cannot be used: it is broken. "
            "Next step: upgrade kvquant-mix, or report this to its author"
        ),
    ),
    (
        errors.IncompatibleTransformError("mix", "kvquant-mix", "1.2", 2, 1),
        (
            "transform 'mix', from kvquant-mix 1.2, cannot be used: it was written for version 2 of the plugin API, "
            "and this kvquant has version 1. Next step: upgrade kvquant"
        ),
    ),
    (
        errors.TransformImportError("mix", "kvquant-mix", "1.2", "mix:Mix", "ImportError: no"),
        (
            "transform 'mix', from kvquant-mix 1.2, cannot be used: importing its transform 'mix:Mix' failed: "
            "ImportError: no. Next step: upgrade kvquant-mix and what it needs, or report this to its author"
        ),
    ),
    (
        errors.HeadDimError("mix", 80, "at most 64 channels work"),
        "transform 'mix' cannot do head_dim=80: at most 64 channels work",
    ),
    (
        errors.TransformFactoryError("mix", "kvquant-mix", "1.2", 80, "KeyError: no"),
        "transform 'mix', from kvquant-mix 1.2, could not make a transform for head_dim=80: KeyError: no",
    ),
    (
        errors.TransformFailedError("mix", "undo", "ZeroDivisionError: by nought"),
        "transform 'mix' failed in its method undo: ZeroDivisionError: by nought",
    ),
    (
        errors.TransformContractError("mix", "undo returned a list and no tensor"),
        (
            "transform 'mix' broke the plugin contract: undo returned a list and no tensor. "
            "This is a bug in the plugin, not in your code."
        ),
    ),
    (
        errors.TransformSpecError("transform 'X'", ["this is wrong", "that is wrong"]),
        "transform 'X' cannot be registered: this is wrong; that is wrong.",
    ),
    (
        errors.TransformExistsError("mix", "kvquant-mix"),
        (
            "there is a transform 'mix' already, from kvquant-mix. Choose another name, or pass replace=True to put "
            "yours in its place."
        ),
    ),
    (
        errors.TransformNotRegisteredError("mix", []),
        "transform 'mix' was not registered in this process, so it cannot be unregistered. Registered: none.",
    ),
]


@pytest.mark.parametrize(("error", "text"), TEXTS, ids=[type(error).__name__ for error, _ in TEXTS])
def test_every_message_word_for_word(error, text):
    """Each names the thing, what would work, and the next step."""
    assert str(error) == text


@pytest.mark.parametrize("kind", BUILTINS)
def test_every_error_is_a_kvquant_error_and_a_builtin(kind):
    """Code that knows nothing of kvquant can catch each as what it naturally is."""
    assert issubclass(kind, (errors.BackendError, errors.TransformError))
    assert issubclass(kind, errors.KVQuantError)
    assert issubclass(kind, BUILTINS[kind])


def test_every_class_is_tested_here():
    """A new error gets a line in both lists."""
    every = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AnyPluginError)}
    assert every - BASES == set(BUILTINS) == {type(error) for error, _ in TEXTS}


def test_every_class_is_in_the_tree_of_the_docstring():
    """The tree shows what there is."""
    assert [kind.__name__ for kind in BUILTINS if kind.__name__ not in (errors.__doc__ or "")] == []


def test_errors_carry_their_parts():
    """Code need not parse text."""
    unknown = errors.UnknownBackendError("x", ["a"], ["y"], "command")
    assert (unknown.name, unknown.installed, unknown.suggestions, unknown.hint) == ("x", ("a",), ("y",), "command")
    duplicate = errors.DuplicateBackendError("x", ["a", "b"])
    assert (duplicate.name, duplicate.distributions) == ("x", ("a", "b"))
    missing = errors.MissingRequirementError("x", [("a>=1", None)], "command")
    assert (missing.name, missing.requirements, missing.hint) == ("x", (("a>=1", None),), "command")
    assert missing.reason == "it needs a>=1 (not installed)"
    blocked = errors.BlockedBackendError("x", "VARIABLE", "value", listed=True)
    assert (blocked.variable, blocked.value, blocked.listed) == ("VARIABLE", "value", True)

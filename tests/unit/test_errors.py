"""Errors travel: between processes, and to code that knows nothing of kvquant."""

import pickle

import pytest

from kvquant import errors
from tests.unit.test_errors_registry import BASES, TEXTS

#: What no error is made of itself.
ABSTRACT = {errors.KVQuantError, errors.ConfigError, *BASES}

EXAMPLES = [
    *(error for error, _ in TEXTS),
    errors.UnknownOptionError("option", "nbit", ["nbits"]),
    errors.OptionValueError("nbits", 5, "one of 1, 2"),
    errors.UnsupportedError("backend 'hqq'", ["nbits=3"], "layer 1"),
    errors.NonFiniteStatesError("key", 3, 9, "layer 2"),
    errors.CropError(-9, 5),
    errors.QuantizationError("hqq", "key", 0, 64, RuntimeError("no"), "layer 2"),
    errors.BackendContractError("hqq", "codes is list"),
    errors.StaleStatesError("value"),
    errors.ReadOnlyStatesError("add_"),
    errors.PendingAssignmentError("key", 3, 5),
    errors.ModelLoadError("model", OSError("not there\nmore")),
    errors.PluginNameTakenError("hqq", "kvquant", "1.0", "my-hqq"),
    errors.ProjectFolderError("here", "it exists and is not empty"),
    errors.MissingExtraError("psutil", "pip install 'kvquant[eval]'"),
    errors.DamagedFileError("prompt.kvq", "it was cut off."),
    errors.FormatVersionError("prompt.kvq", "2", "1"),
    errors.OtherModelError("prompt.kvq", ["its weights are others"]),
    errors.CacheTooLargeError("prompt.kvq", 2**40, 2**30),
    errors.CacheSaveError("prompt.kvq", "No space left on device"),
    errors.UnsavableCacheError("its x is a set", "layer 2"),
    errors.CacheFileError("prompt.kvq", "no cache can be made of it"),
    errors.StatesError("they have three dimensions", "layer 2"),
    errors.CacheFullError(512, 510, 3, "layer 2"),
    errors.OutOfStepError(3, 5, "layer 2"),
    errors.GraphGradientError(),
    errors.PluginNameError("Foo", "it has a capital letter", "foo"),
    errors.JournalSettingsError("run.jsonl", {"nbits": (2, 4)}),
    errors.MalformedLineError("run.jsonl", 3, "it is no JSON"),
    errors.OutOfMemoryError("a window of 4k tokens", 2, "run.jsonl", "fewer tokens"),
    errors.ReportFileError("report.json", "no JSON"),
]


def test_every_error_has_an_example():
    """A new one gets a line above, or among those of the registry."""
    every = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.KVQuantError)}
    assert every - ABSTRACT == {type(error) for error in EXAMPLES}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_cross_a_process_boundary(error):
    """Text and fields survive pickling."""
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.OptionValueError, ValueError),
        (errors.StatesError, ValueError),
        (errors.CropError, ValueError),
        (errors.BackendContractError, TypeError),
        (errors.QuantizationError, RuntimeError),
        (errors.BackendUnavailableError, ImportError),
        (errors.UnknownBackendError, ValueError),
        (errors.TransformUnavailableError, ImportError),
        (errors.UnknownTransformError, ValueError),
        (errors.HeadDimError, ValueError),
        (errors.TransformContractError, TypeError),
        (errors.TransformFailedError, RuntimeError),
        (errors.ModelLoadError, OSError),
        (errors.PluginNameError, ValueError),
        (errors.ProjectFolderError, OSError),
        (errors.MissingExtraError, ImportError),
        (errors.DamagedFileError, ValueError),
        (errors.CacheTooLargeError, MemoryError),
        (errors.CacheSaveError, OSError),
        (errors.UnsavableCacheError, TypeError),
    ],
)
def test_errors_are_natural_builtins(error, builtin):
    """Code that catches the builtin catches ours."""
    assert issubclass(error, builtin)
    assert issubclass(error, errors.KVQuantError)

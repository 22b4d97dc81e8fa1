"""Every error that kvquant raises, with its message, in one place.

Each is also a natural builtin, so that code which knows nothing of kvquant can catch it, and carries its parts as
attributes, so that code need not parse text::

    KVQuantError
    ├── ConfigError (ValueError)            an option, before anything runs
    │   ├── UnknownOptionError              a misspelt option or preset
    │   ├── OptionValueError                a value that can never work
    │   ├── UnsupportedError                a value that this backend or model cannot do
    │   ├── JournalSettingsError            results of a run with other settings
    │   └── PluginNameError                 a name that a new plugin cannot have
    │       └── PluginNameTakenError        ... because an installed plugin has it
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
    ├── TransformError                      a transform, or the declaration of one
    │   ├── UnknownTransformError (ValueError)      no installed transform has that name
    │   ├── TransformUnavailableError (ImportError) there is one, and it cannot be used
    │   │   ├── DuplicateTransformError     several distributions provide it
    │   │   ├── BlockedTransformError       an environment variable forbids it
    │   │   ├── BrokenTransformError        its plugin fails to load
    │   │   │   └── IncompatibleTransformError  ... being written for another plugin API
    │   │   └── TransformImportError        it fails to import
    │   ├── HeadDimError (ValueError)               heads of a size that it cannot do
    │   ├── TransformFactoryError (RuntimeError)    its factory raised something else
    │   ├── TransformFailedError (RuntimeError)     it raised while it was applied or undone
    │   ├── TransformContractError (TypeError)      it returned something else than promised
    │   ├── TransformSpecError (ValueError)         a declaration that cannot work
    │   ├── TransformExistsError (ValueError)       registered under a name that is taken
    │   └── TransformNotRegisteredError (ValueError)    unregistered without having been registered
    ├── StatesError (ValueError)            key and value states that do not fit the cache
    │   ├── NonFiniteStatesError            NaN or infinity in them
    │   └── CacheFullError                  more of them than a cache of fixed size has room for
    ├── CacheFileError (ValueError)         a file that no cache can be made of
    │   ├── DamagedFileError                it is none, or was cut off or altered
    │   ├── FormatVersionError              it is of another version of the format
    │   ├── OtherModelError                 it is the cache of another model
    │   └── CacheTooLargeError (MemoryError)    it would need more memory than there is
    ├── CacheSaveError (OSError)            a cache that could not be written
    ├── UnsavableCacheError (TypeError)     a cache that holds what no file can hold
    ├── CropError (ValueError)              a crop that the cache cannot do
    ├── BackendContractError (TypeError)    a plugin returned something else than it promised
    ├── QuantizationError (RuntimeError)    a plugin raised while quantising or dequantising
    ├── OutOfStepError (RuntimeError)       a compiled graph that lost count, in a step that failed
    ├── GraphGradientError (RuntimeError)   a backward pass through a compiled step
    ├── StaleStatesError (RuntimeError)     states read after the cache behind them has changed
    ├── ReadOnlyStatesError (RuntimeError)  states written to
    ├── ModelLoadError (OSError)            a model that could not be loaded
    ├── ProjectFolderError (OSError)        a folder that a new project cannot be written to
    ├── MissingExtraError (ImportError)     a library that only an extra brings
    ├── MalformedLineError (ValueError)     a line of a JSONL file that is not what it should be
    ├── OutOfMemoryError (MemoryError)      memory ran out in an evaluation
    ├── ReportFileError (ValueError)        a file that is not the JSON of a report
    └── PendingAssignmentError (RuntimeError)  keys were assigned, and values that fit them were not
"""

from kvquant.errors.base import (
    KVQuantError,
    did_you_mean,
    listing,
    origin,
)
from kvquant.errors.config import (
    ConfigError,
    OptionValueError,
    UnknownOptionError,
    UnsupportedError,
)
from kvquant.errors.evaluation import (
    JournalSettingsError,
    MalformedLineError,
    OutOfMemoryError,
    ReportFileError,
)
from kvquant.errors.files import (
    CacheFileError,
    CacheSaveError,
    CacheTooLargeError,
    DamagedFileError,
    FormatVersionError,
    OtherModelError,
    UnsavableCacheError,
)
from kvquant.errors.registry import (
    BackendError,
    BackendExistsError,
    BackendFactoryError,
    BackendImportError,
    BackendNotRegisteredError,
    BackendSpecError,
    BackendUnavailableError,
    BlockedBackendError,
    BrokenBackendError,
    DuplicateBackendError,
    IncompatibleBackendError,
    MissingRequirementError,
    OutdatedRequirementError,
    UnknownBackendError,
)
from kvquant.errors.scaffold import (
    PluginNameError,
    PluginNameTakenError,
    ProjectFolderError,
)
from kvquant.errors.states import (
    BackendContractError,
    CacheFullError,
    CropError,
    GraphGradientError,
    MissingExtraError,
    ModelLoadError,
    NonFiniteStatesError,
    OutOfStepError,
    PendingAssignmentError,
    QuantizationError,
    ReadOnlyStatesError,
    StaleStatesError,
    StatesError,
)
from kvquant.errors.transforms import (
    BlockedTransformError,
    BrokenTransformError,
    DuplicateTransformError,
    HeadDimError,
    IncompatibleTransformError,
    TransformContractError,
    TransformError,
    TransformExistsError,
    TransformFactoryError,
    TransformFailedError,
    TransformImportError,
    TransformNotRegisteredError,
    TransformSpecError,
    TransformUnavailableError,
    UnknownTransformError,
)

__all__ = [
    "KVQuantError",
    "did_you_mean",
    "listing",
    "origin",
    "ConfigError",
    "OptionValueError",
    "UnknownOptionError",
    "UnsupportedError",
    "JournalSettingsError",
    "MalformedLineError",
    "OutOfMemoryError",
    "ReportFileError",
    "CacheFileError",
    "CacheSaveError",
    "CacheTooLargeError",
    "DamagedFileError",
    "FormatVersionError",
    "OtherModelError",
    "UnsavableCacheError",
    "BackendError",
    "BackendExistsError",
    "BackendFactoryError",
    "BackendImportError",
    "BackendNotRegisteredError",
    "BackendSpecError",
    "BackendUnavailableError",
    "BlockedBackendError",
    "BrokenBackendError",
    "DuplicateBackendError",
    "IncompatibleBackendError",
    "MissingRequirementError",
    "OutdatedRequirementError",
    "UnknownBackendError",
    "PluginNameError",
    "PluginNameTakenError",
    "ProjectFolderError",
    "BackendContractError",
    "CacheFullError",
    "CropError",
    "GraphGradientError",
    "MissingExtraError",
    "ModelLoadError",
    "NonFiniteStatesError",
    "OutOfStepError",
    "PendingAssignmentError",
    "QuantizationError",
    "ReadOnlyStatesError",
    "StaleStatesError",
    "StatesError",
    "TransformError",
    "UnknownTransformError",
    "TransformUnavailableError",
    "DuplicateTransformError",
    "BlockedTransformError",
    "BrokenTransformError",
    "IncompatibleTransformError",
    "TransformImportError",
    "HeadDimError",
    "TransformFactoryError",
    "TransformFailedError",
    "TransformContractError",
    "TransformSpecError",
    "TransformExistsError",
    "TransformNotRegisteredError",
]

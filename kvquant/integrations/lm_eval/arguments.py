"""What ``--model_args`` says: which cache, checked before anything is loaded, and what is the harness's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from kvquant.engine.config import OPTIONS, CacheConfig
from kvquant.engine.options import ALIASES, rename_options
from kvquant.engine.settings import layer_settings
from kvquant.engine.typed import parse_value
from kvquant.errors import OptionValueError, UnknownOptionError, did_you_mean
from kvquant.evaluation.candidates import FULL, Candidate, parse_candidates

#: Names of `CacheConfig` that mean something else to the harness, and what they are called here.
RENAMED = {"device": "cache_device"}

#: What says which cache: all in one as ``kvquant eval --backends`` has it, or a preset and options of `CacheConfig`.
CACHE_ARGUMENTS = ("cache", "preset", *(RENAMED.get(option, option) for option in OPTIONS), *ALIASES)

#: What the harness and `from_pretrained` take. Of the latter not all names can be told beforehand: they may be those
#: of the model's config.
_KNOWN = {
    *inspect.signature(HFLM.__init__).parameters,
    *inspect.signature(PreTrainedModel.from_pretrained).parameters,
    "device_map",
    "device_mesh",
    "tp_size",
}


def split_arguments(arguments: Mapping[str, Any]) -> tuple[Candidate, dict[str, Any]]:
    """Split a model's arguments into the cache that they ask for and those that are the harness's.

    ``backend`` is kvquant's: the harness's argument of that name tells two kinds of model apart, only one of which has
    a cache that can be quantised. ``device`` and ``dtype`` are the harness's; where quantised tokens live is
    ``cache_device``.

    Args:
        arguments: as typed by the harness, which makes numbers of what looks like one.

    Raises:
        UnknownOptionError: an argument that neither knows, and that looks like one of kvquant's.
        OptionValueError: no model, a value that can never work, or a cache described twice.
        UnknownBackendError, BackendUnavailableError: the backend does not exist, or cannot be used here.
        UnsupportedError: the backend cannot do what is asked.
    """
    ours = {name: _value(arguments[name]) for name in arguments if name in CACHE_ARGUMENTS}
    theirs = {name: value for name, value in arguments.items() if name not in CACHE_ARGUMENTS}
    for name in theirs:
        if name not in _KNOWN and did_you_mean(name, CACHE_ARGUMENTS):
            raise UnknownOptionError("model argument", name, CACHE_ARGUMENTS)
    if not theirs.get("pretrained"):
        raise OptionValueError("pretrained", theirs.get("pretrained"), "the name or the folder of a model")
    return (_written(ours) if "cache" in ours else _described(ours)), theirs


def _written(arguments: dict[str, Any]) -> Candidate:
    text = arguments.pop("cache")
    if arguments:
        expected = f"all in one, without {', '.join(arguments)} beside it, such as cache=hqq:2:group_size=32"
        raise OptionValueError("cache", text, expected)
    try:
        full, *others = parse_candidates(str(text))
    except OptionValueError as cause:
        option = "cache" if cause.option == "backends" else cause.option
        raise OptionValueError(option, cause.value, cause.expected) from cause
    if text == FULL:
        return full
    if len(others) != 1 or "," in str(text).partition("[")[0]:
        raise OptionValueError("cache", text, "one cache, such as full, hqq:2, kivi-2 or transformers:quanto:4")
    return others[0]


def _described(arguments: dict[str, Any]) -> Candidate:
    names = {name: option for option, name in RENAMED.items()}
    preset = arguments.pop("preset", None)
    options = rename_options({names.get(name, name): value for name, value in arguments.items()}, OPTIONS)
    config = CacheConfig.from_dict(options) if preset is None else CacheConfig.from_preset(str(preset), **options)
    layer_settings(config)  # refuse now what can be told to be impossible for every model
    said = {name: value for name, value in options.items() if name not in ("backend", "nbits") or preset is not None}
    start = [str(preset)] if preset is not None else [config.backend, str(config.nbits)]
    label = ":".join([*start, *(f"{name}={value}".replace(" ", "") for name, value in said.items())])
    return Candidate(label, "kvquant", config.to_dict())


def _value(value: Any) -> Any:
    """Return what was typed: the harness leaves some texts as they are, and makes -1 the number -1.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return parse_value(value) if isinstance(value, str) else value

"""Whether a declaration makes sense: the same for plugins and for what is registered in-process."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from kvquant.errors import listing
from kvquant.plugin.capabilities import AXES, FORMATS, TRELLIS_WIDTHS, Capabilities
from kvquant.plugin.spec import BackendSpec, Requirement
from kvquant.plugin.transform import TransformSpec

NBITS = (1, 2, 3, 4, 8)
DTYPES = ("float32", "float16", "bfloat16", "float64")

_NAME = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*")
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_NAME_RULE = "lower-case letters, digits and single '-', '_' or '.' between them"


def spec_problems(spec: BackendSpec) -> list[str]:
    """Return one sentence for each thing that is wrong with a backend's declaration.

    Plugins are written without a type checker, too, so every field is read as if its annotation were not there.
    """
    problems = _common_problems(spec, ("install_hint", "summary", "url"))
    return problems + _requirement_problems(spec.requires) + _capabilities_problems(spec.capabilities)


def transform_problems(spec: TransformSpec) -> list[str]:
    """Return one sentence for each thing that is wrong with a transform's declaration."""
    return _common_problems(spec, ("summary", "url"))


def _common_problems(spec: Any, texts: tuple[str, ...]) -> list[str]:
    problems = []
    if not isinstance(spec.name, str) or not _NAME.fullmatch(spec.name):
        problems.append(f"name={spec.name!r} must be {_NAME_RULE}")
    if not callable(spec.factory) and not (isinstance(spec.factory, str) and _FACTORY.fullmatch(spec.factory)):
        problems.append(f"factory={spec.factory!r} must be 'module:Class' or a callable")
    for field in texts:
        value = getattr(spec, field)
        if not isinstance(value, str):
            problems.append(f"{field}={value!r} must be a string")
    if type(spec.api_version) is not int:
        problems.append(f"api_version={spec.api_version!r} must be an integer")
    return problems


def _capabilities_problems(capabilities: Any) -> list[str]:
    if isinstance(capabilities, Capabilities):
        return [f"capabilities.{problem}" for problem in _capability_problems(capabilities)]
    return [f"capabilities={capabilities!r} must be a Capabilities"]


def _requirement_problems(requires: Any) -> list[str]:
    if not isinstance(requires, (tuple, list)) or not all(isinstance(item, Requirement) for item in requires):
        return [f"requires={requires!r} must be a tuple of Requirement"]
    problems = []
    for requirement in requires:
        if not isinstance(requirement.distribution, str) or not requirement.distribution:
            problems.append(f"requires: distribution={requirement.distribution!r} must be the name of a distribution")
        if requirement.minimum is not None and not _is_version(requirement.minimum):
            problems.append(f"requires: minimum={requirement.minimum!r} must be a version such as '1.2' or None")
    return problems


def _is_version(text: Any) -> bool:
    # The usual case by pattern: importing packaging takes longer than everything else here.
    if isinstance(text, str) and re.fullmatch(r"\d+(\.\d+)*", text):
        return True
    from packaging.version import InvalidVersion, Version

    try:
        Version(text)
    except (InvalidVersion, TypeError):
        return False
    return True


def _capability_problems(capabilities: Any) -> list[str]:
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    def is_device_type(value: Any) -> bool:
        return isinstance(value, str) and value.isidentifier()

    problems = [
        _choice_problem("nbits", capabilities.nbits, NBITS),
        _choice_problem("axes", capabilities.axes, AXES),
        _choice_problem("formats", capabilities.formats, FORMATS),
        _choice_problem("dtypes", capabilities.dtypes, DTYPES),
        _items_problem("devices", capabilities.devices, is_device_type, "torch device types such as 'cuda'"),
        _mapping_problem("options", capabilities.options, _is_option, "option names to one line of help each"),
        _mapping_problem("axis_aliases", capabilities.axis_aliases, _is_alias, "integers to 'channel' or 'token'"),
    ]
    if capabilities.group_sizes is not None:
        problems.append(_items_problem("group_sizes", capabilities.group_sizes, is_size, "positive integers, or None"))
    if not problems[2] and "opaque" in capabilities.formats and len(capabilities.formats) > 1:
        # Whether a block can be read without the plugin must be known before it is written.
        problems.append(f"formats={capabilities.formats!r}: 'opaque' stands alone")
    if not problems[0] and not problems[2] and set(capabilities.formats) == {"trellis"}:
        too_wide = [nbits for nbits in capabilities.nbits if nbits not in TRELLIS_WIDTHS]
        if too_wide:
            widths = listing(TRELLIS_WIDTHS)
            problems.append(f"nbits={capabilities.nbits!r}: codes of the format 'trellis' have one of {widths} bits")
    if not isinstance(capabilities.deterministic, bool):
        problems.append(f"deterministic={capabilities.deterministic!r} must be True or False")
    return [problem for problem in problems if problem]


def _choice_problem(field: str, values: Any, choices: tuple[Any, ...]) -> str:
    def is_choice(value: Any) -> bool:
        # By type as well: True is not 1 here.
        return any(type(value) is type(choice) and value == choice for choice in choices)

    return _items_problem(field, values, is_choice, f"one or more of {listing(choices)}")


def _items_problem(field: str, values: Any, is_right: Callable[[Any], bool], expected: str) -> str:
    if isinstance(values, (tuple, list)) and values and all(map(is_right, values)):
        return ""
    return f"{field}={values!r} must be a tuple of {expected}"


def _mapping_problem(field: str, values: Any, is_right: Callable[[Any, Any], bool], expected: str) -> str:
    if isinstance(values, Mapping) and all(is_right(key, value) for key, value in values.items()):
        return ""
    return f"{field}={values!r} must map {expected}"


def _is_option(name: Any, explanation: Any) -> bool:
    return isinstance(name, str) and isinstance(explanation, str)


def _is_alias(number: Any, axis: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and axis in AXES

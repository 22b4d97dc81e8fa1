"""Names and values of options that may differ from layer to layer, and how layers are written down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from kvquant.engine.packing import WIDTHS
from kvquant.errors import OptionValueError, UnknownOptionError, UnknownTransformError
from kvquant.registry import check_transform_name

#: Options that may differ from layer to layer.
LAYER_OPTIONS = (
    "backend",
    "nbits",
    "nbits_key",
    "nbits_value",
    "axis_key",
    "axis_value",
    "group_size",
    "group_size_key",
    "group_size_value",
    "rotation_key",
    "rotation_value",
    "smoothing_key",
    "smoothing_value",
    "scale_bits",
    "outlier_share",
    "residual_length",
    "sink_length",
    "options",
)

#: Bits in which scales can be stored.
SCALE_BITS = (8, 16)

#: transformers' names for our options.
ALIASES = {"q_group_size": "group_size"}

#: The largest share of tokens that may be kept as outliers: with more, a longer window or more bits do better.
MOST_KEPT = 0.5

_LAYERS = "layer numbers from 0: 3, range(2, 6), or in text '3', '2-5' (both included) and '0,2-5'"


def is_int(value: object, allowed: tuple[int, ...] | None = None) -> bool:
    """Whether `value` is a whole number (and one of `allowed`); True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and (allowed is None or value in allowed)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a number; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_width(value: object) -> bool:
    """Whether `value` is one of the widths of codes: a whole number, or a float that is none."""
    return any(type(value) is type(width) and value == width for width in WIDTHS)


def rename_options(options: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return `options` under their own names, refusing those that do not exist.

    Raises:
        UnknownOptionError: an option is not among `known` nor an alias.
        OptionValueError: an option and its alias are both given.
    """
    names = tuple(known)
    renamed: dict[str, Any] = {}
    for option, value in options.items():
        name = ALIASES.get(option, option)
        if name not in names:
            raise UnknownOptionError("option", str(option), names)
        if name in renamed:
            raise OptionValueError(
                option, value, f"only one of {', '.join(o for o in options if ALIASES.get(o, o) == name)}"
            )
        renamed[name] = value
    return renamed


def check_layer_options(options: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse values that can never work, whatever the backend and the model.

    Args:
        options: some of `LAYER_OPTIONS`.
        prefix: put before an option's name in messages, e.g. ``"layers['0']."``.

    Raises:
        OptionValueError: naming the option, the value and what would work.
    """
    for option, value in options.items():
        name = prefix + option
        if option == "backend" and (not isinstance(value, str) or not value.strip()):
            raise OptionValueError(name, value, "the name of a backend")
        if option.startswith("nbits") and (value is not None or option == "nbits") and not is_width(value):
            raise OptionValueError(name, value, f"one of {', '.join(map(str, WIDTHS))}")
        if option.startswith("axis") and not (value in ("channel", "token") or is_int(value, (-1, 0, 1))):
            raise OptionValueError(name, value, "'channel' or 'token', or an integer axis that the backend has")
        if option.startswith("group_size") and value is not None and not (is_int(value) and value > 0):
            raise OptionValueError(name, value, "a whole number above 0, or None to have it chosen")
        if option.startswith("rotation") and value is not None:
            _check_transform(name, value)
        if option.startswith("smoothing") and value is not None and not isinstance(value, bool):
            raise OptionValueError(name, value, "True or False, or None to have it chosen")
        if option == "scale_bits" and value is not None and not is_int(value, SCALE_BITS):
            raise OptionValueError(name, value, f"one of {', '.join(map(str, SCALE_BITS))}, or None to have it chosen")
        if option == "outlier_share" and not (is_number(value) and 0 <= value <= MOST_KEPT):
            raise OptionValueError(name, value, f"a share of the tokens, from 0 to {MOST_KEPT}")
        if option.endswith("_length") and not (is_int(value) and value >= 0):
            raise OptionValueError(name, value, "a whole number of tokens, 0 or more")
        if option == "options":
            mapping(name, value)


def _check_transform(option: str, value: Any) -> None:
    """Refuse a name that no transform has; nothing of it is imported."""
    expected = "the name of a transform, or None"
    if not isinstance(value, str):
        raise OptionValueError(option, value, expected)
    try:
        check_transform_name(value)
    except UnknownTransformError as unknown:
        raise OptionValueError(option, value, f"{expected}. {unknown.advice.rstrip('.')}") from None


def mapping(option: str, value: object) -> Mapping[str, Any]:
    """Return `value` if it is a mapping.

    Raises:
        OptionValueError: it is not.
    """
    if not isinstance(value, Mapping):
        raise OptionValueError(option, value, "a mapping of names to values")
    return value


def parse_layers(key: object) -> tuple[int, ...]:
    """Return the layers that `key` names: a number, a range, or text such as ``"3"``, ``"2-5"`` or ``"0,2-5"``.

    The text form has no colons, because YAML reads ``2:6`` as a number of minutes.

    Raises:
        OptionValueError: `key` names no layers.
    """
    numbers: list[int] = []
    if isinstance(key, range):
        numbers = list(key)
    elif is_int(key):
        numbers = [int(str(key))]
    elif isinstance(key, str):
        for part in key.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                raise OptionValueError("layers", key, _LAYERS)
            numbers += range(int(first), int(last if dash else first) + 1)
    if not numbers or min(numbers) < 0:
        raise OptionValueError("layers", key, _LAYERS)
    return tuple(numbers)


def layers_text(layers: tuple[int, ...]) -> str:
    """Write layers down so that `parse_layers` reads them back."""
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))


def normalise_layers(layers: object) -> dict[str, dict[str, Any]]:
    """Return per-layer overrides with keys as text and options under their own names.

    Raises:
        OptionValueError: not a mapping of layers to mappings of options.
        UnknownOptionError: an option that layers do not have.
    """
    if not isinstance(layers, Mapping):
        raise OptionValueError("layers", layers, "a mapping such as {0: {'nbits': 8}, range(2, 6): {'nbits': 2}}")
    normal: dict[str, dict[str, Any]] = {}
    for key, overrides in layers.items():
        name = layers_text(parse_layers(key))
        if not isinstance(overrides, Mapping):
            raise OptionValueError(f"layers[{name!r}]", overrides, "a mapping of options, such as {'nbits': 8}")
        chosen = rename_options(overrides, LAYER_OPTIONS)
        check_layer_options(chosen, f"layers[{name!r}].")
        normal[name] = {**normal.pop(name, {}), **chosen}  # at the end: a later entry wins
    return normal

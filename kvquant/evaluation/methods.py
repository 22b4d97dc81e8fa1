"""Ways to quantise that can be compared: how they are written, found among the backends, and made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvquant.cache.cache import QuantizedCache
from kvquant.engine.config import CacheConfig
from kvquant.engine.settings import check_device, why_not
from kvquant.engine.typed import looks_like_width, parse_value, parse_width
from kvquant.errors import DuplicateBackendError, OptionValueError, UnknownBackendError, UnsupportedError, listing
from kvquant.plugin.capabilities import AXES
from kvquant.plugin.spec import Scheme
from kvquant.registry import Backend, find_backend, list_backends

#: What others are compared with, without options of its own, at the same bits and axis.
YARDSTICK = "reference"

_SYNTAX = (
    "BACKEND[:NBITS][:AXIS][:OPTION=VALUE], such as hqq, hqq:2, reference:4:token or bitsandbytes:4:quant_type=fp4"
)
#: Type of the rows that backends are given here.
_DTYPE = "float32"


@dataclass(frozen=True)
class Method:
    """One way to quantise.

    Attributes:
        backend: the backend's name, with its distribution where several have one of that name.
        nbits, axis: bits of a code, and what shares a scale.
        options: the backend's own options, in order.
    """

    backend: str
    nbits: float
    axis: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """The backend with its options."""
        return " ".join([self.backend, *(f"{name}={value}" for name, value in self.options)])

    @property
    def text(self) -> str:
        """The method in full, as `find_methods` reads it."""
        options = (f"{name}={value}" for name, value in self.options)
        return ":".join([self.backend, str(self.nbits), self.axis, *options])

    def cache(self, group_size: int) -> QuantizedCache:
        """Return an empty cache that quantises every whole block at once, without what the core does to help.

        Raises:
            BackendFactoryError: the backend refuses a value of one of its own options.
        """
        config = CacheConfig.from_dict(
            {
                "backend": self.backend,
                "nbits": self.nbits,
                "axis_key": self.axis,
                "axis_value": self.axis,
                "group_size": group_size,
                "smoothing_key": False,
                "smoothing_value": False,
                "scale_bits": 16,
                "residual_length": 0,
                "options": dict(self.options),
            }
        )
        return QuantizedCache.from_config(config)


def find_methods(
    text: str | None = None,
    *,
    nbits: Sequence[float] | None = None,
    axes: Sequence[str] | None = None,
    group_size: int = 64,
    device: str = "cpu",
) -> tuple[tuple[Method, ...], dict[str, str]]:
    """Return the methods to compare, and the backends that cannot be used here with their reasons.

    Args:
        text: methods separated by commas, each ``BACKEND[:NBITS][:AXIS][:OPTION=VALUE]``; what is left open stands for
            all that the backend declares. None for every backend, `YARDSTICK` first.
        nbits, axes: widths and axes to keep of those; None for all.
        group_size: numbers that share a scale.
        device: torch device that the states will be on.

    Raises:
        UnknownBackendError, BackendUnavailableError: a backend that is named does not exist, or cannot be used.
        OptionValueError: a value can never work, a method is written in another way or twice, or none has the width or
            the axis.
        UnsupportedError: a method that is named cannot be done; or without names, none can.
    """
    check_device(CacheConfig(device=device))
    if group_size < 1:
        raise OptionValueError("group_size", group_size, "at least 1")
    place = (group_size, torch.device(device).type)
    left_out: dict[str, str] = {}
    found = _everything(place, left_out) if text is None else _named(text, place)
    found = _kept(found, "nbits", "nbits", nbits)
    return tuple(_kept(found, "axes", "axis", axes)), left_out


def _everything(place: tuple[int, str], left_out: dict[str, str]) -> list[Method]:
    """Return all that all backends declare; name those that cannot be used in `left_out`."""
    found: list[Method] = []
    for backend in list_backends():
        reason = backend.availability.reason
        if backend.availability.ok:
            can = backend.capabilities
            reason = "; ".join(_why_not(backend, can.nbits[0], can.axes[0], {}, place))
        if reason:
            left_out[backend.qualified_name] = reason
        else:
            found += _combinations(backend, (), (), {})
    if not found:
        reasons = [f"{name}: {reason}" for name, reason in left_out.items()]
        raise UnsupportedError("the installed backends", reasons or ["there are none"])
    return sorted(found, key=lambda method: method.backend != YARDSTICK)


def _named(text: str, place: tuple[int, str]) -> list[Method]:
    found: list[Method] = []
    for part in text.split(","):
        found += _parsed(part.strip(), place)
    # Not through a set: values of options may be lists.
    if any(method in found[:index] for index, method in enumerate(found)):
        raise OptionValueError("backends", text, "each method once")
    return found


def _kept(methods: list[Method], option: str, attribute: str, asked: Sequence[object] | None) -> list[Method]:
    """Return the methods whose `attribute` is one of those asked for; each of those must be there."""
    if asked is None:
        return methods
    there = sorted({getattr(method, attribute) for method in methods})
    for value in asked:
        if value not in there:
            raise OptionValueError(option, value, f"one or more of {listing(there)}, which is what there is to compare")
    return [method for method in methods if getattr(method, attribute) in asked]


# ------------------------------------------------------------------------------------------------ one backend


def _parsed(text: str, place: tuple[int, str]) -> list[Method]:
    name, *details = (part.strip() for part in text.split(":"))
    if not name:
        raise OptionValueError("backends", text, _SYNTAX)
    if details and not _is_detail(details[0]) and not _exists(name):
        name, details = f"{name}:{details[0]}", details[1:]  # a distribution and its backend
    backend = find_backend(name)
    backend.require()
    widths: list[float] = []
    axes: list[str] = []
    options: dict[str, Any] = {}
    for detail in details:
        if not _is_detail(detail):
            raise OptionValueError("backends", text, _SYNTAX)
        option, equals, value = detail.partition("=")
        if equals:
            options[option] = parse_value(value)
        elif detail in AXES:
            axes.append(detail)
        else:
            widths.append(parse_width(detail))
    methods = _combinations(backend, widths, axes, options)
    for method in methods:
        if reasons := _why_not(backend, method.nbits, method.axis, options, place):
            raise UnsupportedError(f"backend {backend.name!r}", reasons)
    return methods


def _combinations(
    backend: Backend, widths: Iterable[float], axes: Iterable[str], options: Mapping[str, Any]
) -> list[Method]:
    """Return widths times axes; none given stand for all that the backend declares."""
    can, name = backend.capabilities, _shortest_name(backend)
    # Widths from few bits to many and axes in one order, so that tables of any two backends read alike.
    ordered = list(axes) or [axis for axis in AXES if axis in can.axes]
    chosen = list(widths) or sorted(can.nbits)
    return [Method(name, nbits, axis, tuple(options.items())) for nbits in chosen for axis in ordered]


def _why_not(
    backend: Backend, nbits: float, axis: Any, options: Mapping[str, Any], place: tuple[int, str]
) -> list[str]:
    group_size, device = place
    scheme = Scheme(backend.capabilities.nbits[0], axis, group_size, options)
    return why_not(backend.capabilities, nbits, scheme, device, _DTYPE)


def _shortest_name(backend: Backend) -> str:
    try:
        alone = find_backend(backend.name) == backend
    except DuplicateBackendError:
        alone = False
    return backend.name if alone else backend.qualified_name


def _exists(name: str) -> bool:
    try:
        find_backend(name)
    except UnknownBackendError:
        return False
    except DuplicateBackendError:
        return True
    return True


def _is_detail(text: str) -> bool:
    return looks_like_width(text) or text in AXES or text.find("=") > 0

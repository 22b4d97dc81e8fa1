"""What each backend makes of the same states: bits, error and speed, side by side.

States go through a cache as a prefill does it, so that bits count all that is held (codes, scales, offsets, tables, in
the types that the core chose) and times are of the whole way: rows, backend, checks, packing. Methods take turns, round
by round in one process, and ratios are taken within a round, because machines are shared and noisy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvquant.cache.cache import QuantizedCache
from kvquant.engine.config import CacheConfig
from kvquant.engine.typed import parse_value
from kvquant.errors import OptionValueError, UnknownBackendError, UnsupportedError
from kvquant.evaluation.measure import Spread, describe_machine, seconds
from kvquant.plugin.capabilities import AXES
from kvquant.registry import Backend, find_backend, list_backends
from kvquant.registry.availability import installed_version

#: What others are compared with, at the same bits and axis.
YARDSTICK = "reference"

_SYNTAX = (
    "BACKEND[:NBITS][:AXIS][:OPTION=VALUE], such as hqq, hqq:2, reference:4:token or bitsandbytes:4:quant_type=fp4"
)
_WARM_UP_TOKENS = 256


@dataclass(frozen=True)
class Method:
    """One way to quantise.

    Attributes:
        backend: the backend's name.
        nbits, axis: bits of a code, and what shares a scale.
        options: the backend's own options, in order.
    """

    backend: str
    nbits: int
    axis: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """The backend with its options."""
        return " ".join([self.backend, *(f"{name}={value}" for name, value in self.options)])

    def cache(self, group_size: int) -> QuantizedCache:
        """Return an empty cache that quantises every whole block at once."""
        config = CacheConfig.from_dict(
            {
                "backend": self.backend,
                "nbits": self.nbits,
                "axis_key": self.axis,
                "axis_value": self.axis,
                "group_size": group_size,
                "residual_length": 0,
                "options": dict(self.options),
            }
        )
        return QuantizedCache.from_config(config)


@dataclass(frozen=True, kw_only=True)
class DistortionOptions:
    """What to measure.

    Attributes:
        methods: what to compare, see `find_methods`.
        group_size: numbers that share a scale.
        tokens, heads, head_dim: of the states, ``[1, heads, tokens, head_dim]``, once as keys and once as values.
        rounds: rounds, in each of which every method has its turn.
        device: torch device.
        seed: of the states.

    Raises:
        OptionValueError: a value can never work.
    """

    methods: tuple[Method, ...]
    group_size: int = 64
    tokens: int = 2048
    heads: int = 4
    head_dim: int = 64
    rounds: int = 3
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("group_size", "tokens", "heads", "head_dim", "rounds"):
            if getattr(self, name) < 1:
                raise OptionValueError(name, getattr(self, name), "at least 1")
        if self.tokens % self.group_size:
            raise OptionValueError("tokens", self.tokens, f"a multiple of the group size, {self.group_size}")
        if self.head_dim % self.group_size:
            raise OptionValueError("head_dim", self.head_dim, f"a multiple of the group size, {self.group_size}")


@dataclass(frozen=True, kw_only=True)
class Distortion:
    """What one method made of the states.

    Attributes:
        backend, nbits, axis, options: the method.
        bits_per_element: all bits held, over the numbers that they stand for.
        error_gaussian, error_outliers: root of the summed squares of the errors over that of the states.
        quantise, dequantise: numbers a second.
        quantise_ratio, dequantise_ratio: the same over the yardstick's in the same round; None without one.
    """

    backend: str
    nbits: int
    axis: str
    options: Mapping[str, Any]
    bits_per_element: float
    error_gaussian: float
    error_outliers: float
    quantise: Spread
    dequantise: Spread
    quantise_ratio: Spread | None
    dequantise_ratio: Spread | None


@dataclass(frozen=True, kw_only=True)
class DistortionReport:
    """What was measured, where, and what could not be.

    Attributes:
        machine: see `describe_machine`.
        libraries: versions of what the backends need, by distribution.
        options: what was asked for.
        results: one for each method, in order.
        left_out: backends that cannot be used here, and why.
    """

    machine: Mapping[str, Any]
    libraries: Mapping[str, str]
    options: DistortionOptions
    results: tuple[Distortion, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report in plain builtins."""
        return asdict(self)


# ------------------------------------------------------------------------------------------------ states


def gaussian_states(options: DistortionOptions) -> Tensor:
    """Return unit normal states ``[1, heads, tokens, head_dim]``, float32."""
    generator = torch.Generator().manual_seed(options.seed)
    states = torch.randn(1, options.heads, options.tokens, options.head_dim, generator=generator)
    return states.to(options.device)


def outlier_states(options: DistortionOptions) -> Tensor:
    """Return states with outlier channels ``[1, heads, tokens, head_dim]``, float32.

    As KIVI (arXiv 2402.02750, section 3.1) finds in keys, a few channels of each head are large for all tokens: one in
    sixteen (at least one), whose numbers are ``a * (b + n)`` with a factor a from 10 to 20, a sign b and n unit normal,
    both a and b fixed for the channel. The others are unit normal.
    """
    generator = torch.Generator().manual_seed(options.seed + 1)
    heads, head_dim = options.heads, options.head_dim
    states = torch.randn(1, heads, options.tokens, head_dim, generator=generator)
    for head in range(heads):
        channels = torch.randperm(head_dim, generator=generator)[: max(1, head_dim // 16)]
        factors = 10 + 10 * torch.rand(len(channels), generator=generator)
        signs = torch.randint(0, 2, (len(channels),), generator=generator) * 2 - 1
        states[0, head, :, channels] = (states[0, head, :, channels] + signs) * factors
    return states.to(options.device)


# ------------------------------------------------------------------------------------------------ methods


def find_methods(
    text: str | None = None,
    *,
    nbits: Iterable[int] | None = None,
    axes: Iterable[str] | None = None,
    group_size: int = 64,
) -> tuple[tuple[Method, ...], dict[str, str]]:
    """Return the methods to compare, and the backends that cannot be used here with their reasons.

    Args:
        text: methods separated by commas, each ``BACKEND[:NBITS][:AXIS][:OPTION=VALUE]``; what is left open stands for
            all that the backend declares. None for every backend.
        nbits, axes: widths and axes to keep of those; None for all.
        group_size: numbers that share a scale; backends without it are left out.

    Raises:
        UnknownBackendError, BackendUnavailableError: a backend that is named does not exist, or cannot be used.
        OptionValueError: a method is written in another way, or twice; or there is none.
        UnsupportedError: a method that is named in full cannot be done.
    """
    widths, kept = (None if nbits is None else set(nbits)), (AXES if axes is None else tuple(axes))
    for axis in kept:
        if axis not in AXES:
            raise OptionValueError("axes", axis, f"one or more of {', '.join(AXES)}")
    found: list[Method] = []
    left_out: dict[str, str] = {}
    if text is None:
        for backend in list_backends():
            if not backend.availability.ok:
                left_out[backend.qualified_name] = backend.availability.reason
            else:
                found += _all_of(backend, group_size)
        found.sort(key=lambda method: method.backend != YARDSTICK)
    else:
        for part in text.split(","):
            found += _parsed(part.strip(), group_size)
    chosen = [method for method in found if (widths is None or method.nbits in widths) and method.axis in kept]
    if len(set(chosen)) < len(chosen):
        raise OptionValueError("backends", text, "each method once")
    if not chosen:
        raise OptionValueError("nbits", sorted(widths or ()), "widths that one of the backends has")
    return tuple(chosen), left_out


def _all_of(backend: Backend, group_size: int, options: Mapping[str, Any] | None = None) -> list[Method]:
    can, chosen = backend.capabilities, tuple((options or {}).items())
    if can.group_sizes is not None and group_size not in can.group_sizes:
        return []
    axes = [axis for axis in AXES if axis in can.axes]
    return [Method(backend.name, nbits, axis, chosen) for nbits in sorted(can.nbits) for axis in axes]


def _parsed(text: str, group_size: int) -> list[Method]:
    name, *rest = text.split(":")
    try:
        backend = find_backend(name)
    except UnknownBackendError:
        if not rest:
            raise
        backend, rest = find_backend(f"{name}:{rest[0]}"), rest[1:]
    backend.require()
    widths: set[int] = set()
    axes: set[str] = set()
    options: dict[str, Any] = {}
    for part in rest:
        option, equals, value = part.partition("=")
        if equals and option:
            options[option] = parse_value(value)
        elif part.isdecimal():
            widths.add(int(part))
        elif part in AXES:
            axes.add(part)
        else:
            raise OptionValueError("backends", text, _SYNTAX)
    known = backend.capabilities
    for what, asked, declared in (("nbits", widths, known.nbits), ("axis", axes, known.axes)):
        if wrong := sorted(asked - set(declared), key=str):
            supported = ", ".join(map(str, declared))
            reason = f"{what}={wrong[0]!r} is not supported; supported: {supported}"
            raise UnsupportedError(f"backend {backend.name!r}", [reason])
    if known.group_sizes is not None and group_size not in known.group_sizes:
        supported = ", ".join(map(str, known.group_sizes))
        reason = f"group_size={group_size} is not supported; supported: {supported}"
        raise UnsupportedError(f"backend {backend.name!r}", [reason])
    methods = _all_of(backend, group_size, options)
    return [
        method for method in methods if (not widths or method.nbits in widths) and (not axes or method.axis in axes)
    ]


# ------------------------------------------------------------------------------------------------ measuring


def measure_distortion(
    options: DistortionOptions, left_out: Mapping[str, str], progress: Callable[[float], None]
) -> DistortionReport:
    """Measure every method.

    Args:
        options: what to measure.
        left_out: what `find_methods` left out, for the report.
        progress: called with 1 for each turn of a method that is over, `len(methods) * (rounds + 1)` times.

    Raises:
        UnsupportedError, BackendFactoryError: a method cannot do what is asked, before anything is measured.
    """
    for method in options.methods:
        method.cache(options.group_size)
    gaussian, outliers = gaussian_states(options), outlier_states(options)
    quality: list[tuple[float, float, float]] = []
    for method in options.methods:
        warm = method.cache(options.group_size)
        warm.update(gaussian[:, :, :_WARM_UP_TOKENS], gaussian[:, :, :_WARM_UP_TOKENS], 0)
        quality.append(_quality(method, options, gaussian, outliers))
        progress(1)
    times: list[list[tuple[float, float]]] = [[] for _ in options.methods]
    for _ in range(options.rounds):
        for method, taken in zip(options.methods, times, strict=True):
            taken.append(_times(method, options, gaussian))
            progress(1)
    results = tuple(
        _result(method, *measured, index=index, times=times, options=options)
        for index, (method, measured) in enumerate(zip(options.methods, quality, strict=True))
    )
    return DistortionReport(
        machine=describe_machine(options.device),
        libraries=_libraries(options.methods),
        options=options,
        results=results,
        left_out=dict(left_out),
    )


def _quality(method: Method, options: DistortionOptions, *all_states: Tensor) -> tuple[float, float, float]:
    """Return bits per element of the first states, and the relative error of each."""
    errors: list[float] = []
    bits = 0.0
    for states in all_states:
        cache = method.cache(options.group_size)
        cache.update(states, states, 0)
        bits = bits or cache.bits_per_element or 0.0
        read = cache.layers[0].keys
        errors.append(float((read.double() - states.double()).norm() / states.double().norm()))
    return bits, errors[0], errors[1]


def _times(method: Method, options: DistortionOptions, states: Tensor) -> tuple[float, float]:
    """Return seconds to quantise, and to read all of it tile by tile, as attention would."""
    cache = method.cache(options.group_size)
    quantise = seconds(lambda: cache.update(states, states, 0), states.device)

    def read() -> None:
        for store in cache.layers[0].stores:
            for start, stop in store.spans(options.tokens):
                store.tile(start, stop)

    return quantise, seconds(read, states.device)


def _result(
    method: Method,
    bits: float,
    gaussian: float,
    outliers: float,
    *,
    index: int,
    times: list[list[tuple[float, float]]],
    options: DistortionOptions,
) -> Distortion:
    yardstick = next(
        (
            at
            for at, other in enumerate(options.methods)
            if (other.backend, other.nbits, other.axis) == (YARDSTICK, method.nbits, method.axis)
        ),
        None,
    )
    numbers = 2 * options.heads * options.tokens * options.head_dim
    speeds = [Spread.of([numbers / taken[way] for taken in times[index]]) for way in (0, 1)]
    ratios: list[Spread | None] = [None, None]
    if yardstick is not None:
        pairs = list(zip(times[yardstick], times[index], strict=True))
        ratios = [Spread.of([base[way] / own[way] for base, own in pairs]) for way in (0, 1)]
    return Distortion(
        backend=method.backend,
        nbits=method.nbits,
        axis=method.axis,
        options=dict(method.options),
        bits_per_element=bits,
        error_gaussian=gaussian,
        error_outliers=outliers,
        quantise=speeds[0],
        dequantise=speeds[1],
        quantise_ratio=ratios[0],
        dequantise_ratio=ratios[1],
    )


def _libraries(methods: Iterable[Method]) -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in dict.fromkeys(method.backend for method in methods):
        spec = find_backend(name).spec
        for requirement in spec.requires if spec else ():
            versions[requirement.distribution] = installed_version(requirement.distribution) or "unknown"
    return versions

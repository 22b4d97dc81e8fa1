"""What a user can choose, checked before anything runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvquant.engine.options import (
    LAYER_OPTIONS,
    check_layer_options,
    is_int,
    mapping,
    normalise_layers,
    parse_layers,
    rename_options,
)
from kvquant.errors import OptionValueError, UnknownOptionError

_COMPUTE_DTYPES = ("float32", "float16", "bfloat16", "float64")

_AXES = {"axis_key": "channel", "axis_value": "token"}
#: What the measurements of docs/quality.md recommend: KIVI's axes, groups of 64, sinks, smoothed channels, rotated
#: values, scales in bytes; bits go to keys first.
_MEASURED = {
    **_AXES,
    "group_size": 64,
    "residual_length": 128,
    "sink_length": 4,
    "smoothing_key": True,
    "smoothing_value": True,
    "rotation_value": "hadamard",
    "scale_bits": 8,
}
#: Least squares lose tokens that attention looks for, see the same page.
_FOURTH = {"options": {"scale": "fourth"}}
_KIVI = {
    **_AXES,
    "group_size": 32,
    "residual_length": 128,
    "smoothing_key": False,
    "smoothing_value": False,
    "scale_bits": 16,
    "options": {"scale": "range"},
}

#: Named settings. KIVI's are those of its paper (arXiv 2402.02750, section 4.1): group 32, a window of 128 tokens.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"nbits": 2, "nbits_key": 2, "nbits_value": 1, **_MEASURED, **_FOURTH},
    "smallest": {"nbits": 2, **_MEASURED, **_FOURTH},
    "small": {"nbits": 2, "nbits_key": 3, "nbits_value": 2, **_MEASURED, **_FOURTH},
    "balanced": {"nbits": 4, **_MEASURED, **_FOURTH},
    "accurate": {"nbits": 4, "nbits_key": 8, "nbits_value": 4, **_MEASURED, "scale_bits": 16},
    "kivi-2": {"nbits": 2, **_KIVI},
    "kivi-4": {"nbits": 4, **_KIVI},
    "int8": {"nbits": 8, **_AXES, "group_size": 64, "residual_length": 64},
}


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Everything that a quantised cache can be told.

    Attributes:
        backend: name of the backend, as ``kvquant list-backends`` shows it.
        nbits: bits a code takes: 1, 2, 3, 4 or 8, as far as the backend has them, or 1.5, 2.5 or 3.5, where the first
            half of a head's channels takes the width above and the second half the width below.
        nbits_key, nbits_value: the same for keys or values alone.
        axis_key, axis_value: ``"channel"`` or ``"token"``, or transformers' integer for backends that have them.
        group_size: numbers that share a scale; None takes 64, or where that does not fit the largest below that does.
            transformers' name `q_group_size` is accepted too.
        group_size_key, group_size_value: the same for keys or values alone.
        rotation_key, rotation_value: name of the transform of a head's channels before they are quantised, as
            ``kvquant list-transforms`` shows it; None for none. Rotations (``"hadamard"``, ``"random"``) spread outlier
            channels, which helps keys on the token axis most.
        smoothing_key, smoothing_value: whether channels are centred, and outlier channels scaled down, by what the
            first quantised block says of them (see `kvquant.transforms.smoothing`). None smooths what has less than 4
            bits, and keys on the token axis.
        scale_bits: bits in which each scale, and each offset, is stored: 16, or 8, as far as that does no harm (see
            `kvquant.engine.scales`); a scale that needs more gets more. None takes 8 for what has less than 4 bits,
            and 16 for all else.
        outlier_share: share of the quantised tokens, up to a half, whose states are kept exact beside their codes: in
            each block, of each head, those that quantisation harms most; one of a block at least. 0 for none. They are
            read in `compute_dtype`.
        residual_length: most recent tokens that stay in full precision, at least.
        sink_length: first tokens that stay in full precision for ever.
        compute_dtype: floating type in which groups are quantised, dequantised and attended; None takes float32
            (float64 for float64 states).
        device: where quantised tokens live; None keeps them with the model's layer. Elsewhere, tiles are brought over
            as attention reads them.
        offload: whether quantised tokens live in host memory (pinned, with CUDA), from where they come back packed, a
            layer ahead of attention, so that the device holds those of two layers. The first and the most recent
            tokens stay on the device. It costs nothing where the model runs on the CPU, and cannot be combined with
            `device`.
        layers: options for some layers alone: ``{0: {"nbits": 8}, range(2, 6): {"backend": "hqq"}}``; in a file
            ``"2-5"``. For a layer named twice the later entry wins.
        skip_layers: layers that stay in full precision; negative numbers count from the last.
        max_cache_len: tokens that there is room for, prompt and new ones together. The cache is then of fixed size: its
            shapes are the same at every step, and `torch.compile` can work with it. None for no limit.
        check_finite: whether NaN and infinity in the states are an error.
        options: the backend's own options.

    Raises:
        OptionValueError: a value can never work.
        UnknownOptionError: an option does not exist.
    """

    backend: str = "reference"
    nbits: float = 4
    nbits_key: float | None = None
    nbits_value: float | None = None
    axis_key: str | int = "channel"
    axis_value: str | int = "token"
    group_size: int | None = None
    group_size_key: int | None = None
    group_size_value: int | None = None
    rotation_key: str | None = None
    rotation_value: str | None = None
    smoothing_key: bool | None = None
    smoothing_value: bool | None = None
    scale_bits: int | None = None
    outlier_share: float = 0.0
    residual_length: int = 128
    sink_length: int = 0
    compute_dtype: str | None = None
    device: str | None = None
    offload: bool = False
    layers: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)
    skip_layers: tuple[int, ...] = ()
    max_cache_len: int | None = None
    check_finite: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_layer_options(_layer_options_of(self))
        normal: dict[str, object] = {
            "layers": normalise_layers(self.layers),
            "skip_layers": _layer_numbers(self.skip_layers),
            "compute_dtype": _dtype_name(self.compute_dtype),
            "device": None if self.device is None else device_name(self.device),
            "options": dict(self.options),
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)  # how a frozen dataclass normalises its own fields
        if self.max_cache_len is not None and (not is_int(self.max_cache_len) or self.max_cache_len < 1):
            expected = "a whole number of tokens, those of the prompt and the new ones, or None for no limit"
            raise OptionValueError("max_cache_len", self.max_cache_len, expected)
        for name in ("offload", "check_finite"):
            if not isinstance(getattr(self, name), bool):
                raise OptionValueError(name, getattr(self, name), "True or False")
        if self.offload and self.device is not None:
            expected = f"False, or no device={self.device!r}: both say where quantised tokens live"
            raise OptionValueError("offload", self.offload, expected)

    # -------------------------------------------------------------------------------------------- making one

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> CacheConfig:
        """Make a config from a mapping of options, as `to_dict` gives it or as a user types it."""
        return cls(**rename_options(options, OPTIONS))

    @classmethod
    def from_preset(cls, preset: str, **options: Any) -> CacheConfig:
        """Make a config from one of `PRESETS`; `options` override its settings."""
        if preset not in PRESETS:
            raise UnknownOptionError("preset", preset, PRESETS)
        return cls.from_dict(overridden(PRESETS[preset], rename_options(options, OPTIONS)))

    @classmethod
    def from_json(cls, text: str) -> CacheConfig:
        """Make a config from what `to_json` wrote."""
        try:
            options = json.loads(text)
        except ValueError as cause:
            raise OptionValueError("the JSON text", text[:40], f"valid JSON; {cause}") from cause
        return cls.from_dict(mapping("the JSON text", options))

    @classmethod
    def from_yaml(cls, text: str) -> CacheConfig:
        """Make a config from what `to_yaml` wrote."""
        import yaml

        try:
            options = yaml.safe_load(text)
        except yaml.YAMLError as cause:
            raise OptionValueError("the YAML text", text[:40], f"valid YAML; {cause}") from cause
        return cls.from_dict(mapping("the YAML text", options))

    @classmethod
    def from_file(cls, path: str | Path) -> CacheConfig:
        """Make a config from a ``.json``, ``.yaml`` or ``.yml`` file.

        Raises:
            OptionValueError: it cannot be read, or has something else in it.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as cause:
            preset = f"; the preset is QuantizedCache.from_preset({str(path)!r})" if str(path) in PRESETS else ""
            expected = f"a .json, .yaml or .yml file that can be read ({cause}){preset}"
            raise OptionValueError("config", str(path), expected) from cause
        return cls.from_json(text) if Path(path).suffix == ".json" else cls.from_yaml(text)

    # -------------------------------------------------------------------------------------------- writing it down

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins; `from_dict` makes the same config of them."""
        return {**dataclasses.asdict(self), "skip_layers": list(self.skip_layers)}

    def to_json(self) -> str:
        """Return JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_yaml(self) -> str:
        """Return YAML text."""
        import yaml

        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))

    # -------------------------------------------------------------------------------------------- layers

    def layer_options(self, layer: int | None) -> dict[str, Any]:
        """Return the per-layer options that hold for `layer`: its own over the general ones (None: those alone)."""
        merged = _layer_options_of(self)
        for key, overrides in self.layers.items():
            if layer in parse_layers(key):
                merged = overridden(merged, overrides)
        return merged

    def skips(self, layer: int, count: int | None = None) -> bool:
        """Whether `layer` stays in full precision; `count` is the model's number of layers, where it is known.

        Raises:
            OptionValueError: a negative layer number while `count` is not known.
        """
        if count is None and any(skipped < 0 for skipped in self.skip_layers):
            raise OptionValueError(
                "skip_layers", list(self.skip_layers), "layers from 0 on, or config=model.config to count from the last"
            )
        return layer in self.skip_layers or (count is not None and layer - count in self.skip_layers)

    def check_layer_count(self, count: int) -> None:
        """Refuse layers that a model of `count` layers does not have.

        Raises:
            OptionValueError: naming the option and the layer.
        """
        for layer in self.skip_layers:
            if not -count <= layer < count:
                raise OptionValueError("skip_layers", layer, f"a layer from 0 to {count - 1}")
        for key in self.layers:
            if max(parse_layers(key)) >= count:
                raise OptionValueError("layers", key, f"layers from 0 to {count - 1}")


def overridden(options: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with others over them: what is said of both streams beats what was said of one before."""
    merged = dict(options)
    for general in {"nbits", "group_size"} & set(overrides):
        merged[f"{general}_key"] = merged[f"{general}_value"] = None
    if "backend" in overrides:
        merged["options"] = {}  # those were for another backend
    return {**merged, **overrides}


OPTIONS = tuple(option.name for option in dataclasses.fields(CacheConfig))


def _layer_options_of(config: CacheConfig) -> dict[str, Any]:
    return {option: getattr(config, option) for option in LAYER_OPTIONS}


def _layer_numbers(value: object) -> tuple[int, ...]:
    items = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    if not all(is_int(item) for item in items):
        raise OptionValueError("skip_layers", value, "layer numbers, such as [0, 1]")
    return tuple(int(str(item)) for item in items)


def _dtype_name(dtype: object) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _COMPUTE_DTYPES:
        raise OptionValueError("compute_dtype", dtype, f"one of {', '.join(_COMPUTE_DTYPES)}")
    return name


def device_name(device: Any) -> str:
    """Return the name of a torch device, however it was given.

    Raises:
        OptionValueError: torch knows no such device.
    """
    import torch

    try:
        return str(torch.device(device))
    except (RuntimeError, TypeError) as cause:
        raise OptionValueError("device", device, "a torch device such as 'cpu' or 'cuda:0'") from cause

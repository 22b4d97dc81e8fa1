"""From what a user wrote to what one layer does: backends looked up, axes and groups decided, refusals made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from kvquant.engine.config import CacheConfig
from kvquant.engine.grouping import block_tokens
from kvquant.engine.packing import widths_of
from kvquant.engine.window import WindowPolicy
from kvquant.errors import HeadDimError, OptionValueError, UnsupportedError, listing
from kvquant.plugin.capabilities import Capabilities
from kvquant.plugin.quantizer import Quantizer
from kvquant.plugin.spec import Axis, Scheme
from kvquant.registry import Backend, TransformPlugin, get_backend, get_transform
from kvquant.transforms.heads import HeadTransform, head_transform

DEFAULT_GROUP_SIZE = 64

#: Below this width channels are smoothed and scales stored in bytes, where the user does not say: together they take
#: more than half of what two bits cost, and little of what four bits do (docs/quality.md).
LOW_BITS = 4

#: Formats in which the halves of a head's channels can have widths of their own.
MIXED_FORMATS = {"affine", "codebook"}


@dataclass(frozen=True)
class StreamSettings:
    """What the keys, or the values, of one layer do.

    Attributes:
        stream: ``"key"`` or ``"value"``.
        where: the layer, for messages; empty for the settings of a whole cache.
        backend: the backend that quantises them.
        nbits, axis, group_size: what the scheme says; `group_size` None is decided once head_dim is known.
        transform: what is done to a head's channels before, None for nothing.
        smooths: whether channels are smoothed before that.
        scale_bits: bits in which scales are stored, as far as that does no harm.
        options: the backend's own options.
    """

    stream: str
    where: str
    backend: Backend
    nbits: float
    axis: Axis
    group_size: int | None
    transform: TransformPlugin | None
    smooths: bool
    scale_bits: int
    options: Mapping[str, Any]

    def scheme(self, head_dim: int | None = None, device: str | None = None, dtype: str | None = None) -> Scheme:
        """Return the scheme for states of `head_dim` channels, or for the first half of them if `nbits` is mixed.

        Args:
            head_dim: channels of a head; None when not known yet, which leaves the group size open to doubt.
            device: torch device type of the states, None when not known yet.
            dtype: name of the torch type of the rows, None when not known yet.

        Raises:
            UnsupportedError: the backend cannot do it, or the group size does not fit; says what would work.
        """
        capabilities = self.backend.capabilities
        widths = widths_of(self.nbits)
        if head_dim is not None and head_dim % len(widths):
            raise self._unsupported([f"nbits={self.nbits} needs an even head_dim, and it is {head_dim}"])
        group_size = self.group_size or self._best_group(capabilities, head_dim)
        scheme = Scheme(widths[0], self.axis, group_size, self.options)
        reasons = why_not(capabilities, self.nbits, scheme, device, dtype)
        if head_dim is not None and self.axis == "token" and self._alike(head_dim) % group_size:
            works = _fitting_groups(capabilities, self._alike(head_dim))
            reasons.append(
                f"group_size={group_size} does not divide {self._span(head_dim)}; those that do: {listing(works)}"
            )
        if head_dim is not None:
            reasons += self._transform_reasons(head_dim)
        if reasons:
            raise self._unsupported(reasons)
        return scheme

    def head_transform(self, head_dim: int) -> HeadTransform | None:
        """Return the transform for states of `head_dim` channels; None for none.

        Raises:
            TransformError: it cannot be had, or cannot do heads of that size (which `scheme` has refused).
        """
        return None if self.transform is None else head_transform(self.transform, head_dim)

    def _transform_reasons(self, head_dim: int) -> list[str]:
        try:
            self.head_transform(head_dim)
        except HeadDimError as cause:
            return [f"rotation_{self.stream}={cause.name!r} does not work with head_dim={head_dim}: {cause.problem}"]
        return []

    def quantizers(self, scheme: Scheme) -> list[tuple[Scheme, Quantizer]]:
        """Make the quantizer for `scheme`, and one for the second half of the channels where `nbits` is mixed.

        Raises:
            BackendError: see `kvquant.registry.Backend.create`.
        """
        schemes = [replace(scheme, nbits=width) for width in widths_of(self.nbits)]
        return [(each, self.backend.create(each)) for each in schemes]

    def _alike(self, head_dim: int) -> int:
        """Return how many channels have the same width, in which a group of the token axis must lie."""
        return head_dim // len(widths_of(self.nbits))

    def _span(self, head_dim: int) -> str:
        whole = f"head_dim={head_dim}"
        return whole if self._alike(head_dim) == head_dim else f"half of {whole} (nbits={self.nbits} has two widths)"

    def _best_group(self, capabilities: Capabilities, head_dim: int | None) -> int:
        if self.axis == "token" and head_dim is not None:
            candidates = _fitting_groups(capabilities, self._alike(head_dim))
        else:
            candidates = list(capabilities.group_sizes or (DEFAULT_GROUP_SIZE,))
        if not candidates and head_dim is not None:
            sizes = listing(capabilities.group_sizes or ())
            raise self._unsupported([f"none of its group sizes ({sizes}) divides {self._span(head_dim)}"])
        small = [size for size in candidates if size <= DEFAULT_GROUP_SIZE]
        return max(small) if small else min(candidates)

    def _unsupported(self, reasons: list[str]) -> UnsupportedError:
        place = f"{self.stream} states" + (f" of {self.where}" if self.where else "")
        return UnsupportedError(f"backend {self.backend.name!r}", reasons, place)


@dataclass(frozen=True)
class LayerSettings:
    """What one layer does."""

    key: StreamSettings
    value: StreamSettings
    residual_length: int
    sink_length: int
    outlier_share: float = 0.0

    def policy(self, key_scheme: Scheme, value_scheme: Scheme, span: int | None = None) -> WindowPolicy:
        """Return the window policy for these schemes; `span` is the most tokens that a later query sees."""
        groups = [(scheme.axis, scheme.group_size) for scheme in (key_scheme, value_scheme)]
        return WindowPolicy(self.sink_length, self.residual_length, block_tokens(groups), span)


def layer_settings(config: CacheConfig, layer: int | None = None) -> LayerSettings:
    """Decide what `layer` does (None: any layer that has no options of its own).

    Raises:
        UnknownBackendError: and the other errors of `get_backend`.
        BackendUnavailableError: the backend's library is not installed.
        UnsupportedError: the backend cannot do what is asked, as far as can be told before the first states.
        BackendFactoryError: the backend refuses a value of one of its own options.
        UnknownTransformError: and the other errors of `get_transform`.
    """
    options = config.layer_options(layer)
    backend = get_backend(options["backend"])
    backend.require()
    streams = []
    for stream in ("key", "value"):
        nbits, group_size = options[f"nbits_{stream}"], options[f"group_size_{stream}"]
        rotation, smooths = options[f"rotation_{stream}"], options[f"smoothing_{stream}"]
        nbits = options["nbits"] if nbits is None else nbits
        axis = _axis(backend, f"axis_{stream}", options[f"axis_{stream}"])
        if smooths is None:
            # A scale that keys share over channels is ruined by outlier channels at any width.
            smooths = nbits < LOW_BITS or (stream, axis) == ("key", "token")
        settings = StreamSettings(
            stream=stream,
            where="" if layer is None else f"layer {layer}",
            backend=backend,
            nbits=nbits,
            axis=axis,
            group_size=options["group_size"] if group_size is None else group_size,
            transform=None if rotation is None else get_transform(rotation),
            smooths=smooths,
            scale_bits=options["scale_bits"] or (8 if nbits < LOW_BITS else 16),
            options=options["options"],
        )
        scheme = settings.scheme(dtype=config.compute_dtype)
        if scheme.options:
            # Values of a backend's own options are the one thing that only its factory can judge: ask it now, and not
            # when the first states come.
            settings.quantizers(scheme)
        streams.append(settings)
    lengths = options["residual_length"], options["sink_length"]
    return LayerSettings(streams[0], streams[1], *lengths, options["outlier_share"])


def compute_dtype(config: CacheConfig, states: torch.dtype) -> torch.dtype:
    """Return the type in which states of type `states` are quantised and attended."""
    if config.compute_dtype is not None:
        return cast("torch.dtype", getattr(torch, config.compute_dtype))
    return torch.promote_types(states, torch.float32)


def check_device(config: CacheConfig) -> None:
    """Refuse a device that quantised tokens cannot live on.

    Raises:
        OptionValueError: it is not there, or holds no numbers.
    """
    if config.device is None:
        return
    try:
        holds_numbers = torch.zeros(1, device=config.device).tolist() == [0.0]
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        raise OptionValueError("device", config.device, "a device that this machine has, such as 'cpu'") from cause
    if not holds_numbers:
        raise OptionValueError("device", config.device, "a device that holds numbers, such as 'cpu'")


def _axis(backend: Backend, option: str, axis: str | int) -> Axis:
    aliases = backend.capabilities.axis_aliases
    if isinstance(axis, str):
        return cast("Axis", axis)
    if axis not in aliases:
        known = ", ".join(f"{number} ({meaning})" for number, meaning in aliases.items()) or "none"
        reason = f"{option}={axis} is not an integer axis of it; it has: {known}; 'channel' and 'token' always work"
        raise UnsupportedError(f"backend {backend.name!r}", [reason])
    return cast("Axis", aliases[axis])


def why_not(
    capabilities: Capabilities, nbits: float, scheme: Scheme, device: str | None = None, dtype: str | None = None
) -> list[str]:
    """Say why a backend cannot do `scheme` with `nbits` bits: one reason an item, empty when it can.

    Args:
        capabilities: of the backend.
        nbits: bits of a code, maybe a mixed width; what `scheme` says of them is not looked at.
        scheme: what else is asked for.
        device, dtype: see `Capabilities.why_not`.
    """
    widths = widths_of(nbits)
    if len(widths) == 1:
        return capabilities.why_not(replace(scheme, nbits=widths[0]), device, dtype)
    reasons, supported = [], ", ".join(map(str, capabilities.nbits))
    if any(width not in capabilities.nbits for width in widths):
        reasons.append(f"nbits={nbits} is a mix of {widths[0]} and {widths[1]} bits; supported: {supported}")
    if unmixable := set(capabilities.formats) - MIXED_FORMATS:
        lacking = f"which the format {listing(unmixable)} does not have"
        reasons.append(f"nbits={nbits} is a mix of two widths, {lacking}; supported: {supported}")
    return reasons + capabilities.why_not(replace(scheme, nbits=capabilities.nbits[0]), device, dtype)


def _fitting_groups(capabilities: Capabilities, channels: int) -> list[int]:
    sizes = capabilities.group_sizes or range(1, channels + 1)
    return [size for size in sizes if channels % size == 0]

"""What a backend can do, in strings and numbers, so that the core can refuse early and say what would work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvquant.errors import listing

if TYPE_CHECKING:
    from kvquant.plugin.spec import Scheme

AXES = ("channel", "token")
FORMATS = ("affine", "codebook", "trellis", "opaque")
#: Widths of codes of the format ``"trellis"``; its levels are chosen with one bit more.
TRELLIS_WIDTHS = (1, 2, 3)


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do.

    Attributes:
        nbits: code widths, each of 1, 2, 3, 4, 8; where ``"trellis"`` is the only format, of 1, 2, 3.
        axes: of ``"channel"``, ``"token"``.
        group_sizes: group sizes that work, or None for any.
        devices: torch device types, e.g. ``("cpu", "cuda")``.
        dtypes: torch floating types of the rows it takes, by name.
        formats: of ``"affine"``, ``"codebook"``, ``"trellis"``, ``"opaque"``.
        deterministic: the same rows always give the same codes.
        options: names of the backend's own options, each with one line of help.
        axis_aliases: transformers' integer axes for this backend and the axis each one means.
    """

    nbits: tuple[int, ...]
    axes: tuple[str, ...] = AXES
    group_sizes: tuple[int, ...] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    formats: tuple[str, ...] = ("affine",)
    deterministic: bool = True
    options: Mapping[str, str] = field(default_factory=dict)
    axis_aliases: Mapping[int, str] = field(default_factory=dict)

    def why_not(self, scheme: Scheme, device: str | None = None, dtype: str | None = None) -> list[str]:
        """Say why this backend cannot do `scheme`: one reason an item, empty when it can.

        Args:
            scheme: what is asked for.
            device: torch device type, e.g. ``"cuda"``; None when not known yet.
            dtype: torch floating type of the rows by name, e.g. ``"float16"``; None when not known yet.

        Returns:
            Reasons such as ``"nbits=3 is not supported; supported: 2, 4, 8"``.
        """
        checks: list[tuple[str, object, tuple[object, ...] | None]] = [
            ("nbits", scheme.nbits, self.nbits),
            ("axis", scheme.axis, self.axes),
            ("group_size", scheme.group_size, self.group_sizes),
            ("device", device, self.devices),
            ("dtype", dtype, self.dtypes),
        ]
        reasons = [
            f"{option}={value!r} is not supported; supported: {listing(allowed)}"
            for option, value, allowed in checks
            if value is not None and allowed is not None and value not in allowed
        ]
        unknown = [name for name in scheme.options if name not in self.options]
        if unknown:
            known = listing(self.options)
            reasons += [f"option {name!r} is unknown to this backend; known: {known}" for name in unknown]
        return reasons

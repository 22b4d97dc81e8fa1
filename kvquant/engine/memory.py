"""What a cache's memory is made of, counted from the tensors that it really holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: Parts of a layer's memory. Copies are those on the device of what lives in host memory; spare is what is allocated
#: and not in use yet.
PARTS = ("sink", "codes", "scales", "tables", "outliers", "window", "full precision", "copies", "spare")
#: Parts that hold quantised tokens; their bits are counted over the numbers that are quantised.
STORED = ("codes", "scales", "tables", "outliers")


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind `tensors`, each counted once."""
    storages = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _address(tensor: Tensor) -> int:
    """Return what tells the storage behind a tensor from others; those of the meta device have no data to point to."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata


@dataclass(frozen=True)
class LayerMemory:
    """Memory of one layer.

    Attributes:
        layer: its number.
        tokens: tokens held.
        quantized_tokens: tokens in the body.
        quantized_elements: numbers in the body, keys and values together, all batch rows and heads.
        parts: bytes by part.
        devices: the same bytes by the device that they lie on.
        outlier_share: share of the body's tokens, of each head, whose states are kept exact.
    """

    layer: int
    tokens: int
    quantized_tokens: int
    quantized_elements: int
    parts: dict[str, int] = field(default_factory=dict)
    devices: dict[str, int] = field(default_factory=dict)
    outlier_share: float = 0.0

    @property
    def nbytes(self) -> int:
        """All bytes of the layer."""
        return sum(self.parts.values())

    @property
    def bits_per_element(self) -> float | None:
        """Stored bits (codes, scales, offsets, tables, outliers) over quantised numbers; None while there are none."""
        if not self.quantized_elements:
            return None
        return 8 * sum(self.parts[part] for part in STORED) / self.quantized_elements


def layer_memory(
    layer: int,
    tokens: int,
    quantized: tuple[int, int],
    parts: Iterable[tuple[str, Tensor, int]],
    outlier_share: float = 0.0,
) -> LayerMemory:
    """Add up what a layer holds.

    Args:
        layer: its number.
        tokens: tokens held.
        quantized: tokens, and numbers, in the body.
        parts: ``(part, tensor, valid bytes)`` for every tensor held.
        outlier_share: as in `LayerMemory`.
    """
    held = list(parts)
    sums = dict.fromkeys(PARTS, 0)
    seen: set[int] = set()
    for part, tensor, valid in held:
        address = _address(tensor)
        if address not in seen:  # batch rows can share a tensor
            seen.add(address)
            sums[part] += valid
    sums["spare"] = tensor_bytes(tensor for _, tensor, _ in held) - sum(sums.values())
    places = dict.fromkeys(str(tensor.device) for _, tensor, _ in held)
    devices = {place: tensor_bytes(tensor for _, tensor, _ in held if str(tensor.device) == place) for place in places}
    return LayerMemory(layer, tokens, quantized[0], quantized[1], sums, devices, outlier_share)


@dataclass(frozen=True)
class MemoryReport:
    """Memory of a cache, by layer and part. Print it, or take `to_dict()`.

    Attributes:
        layers: one for each layer.
        attention: what attends over the quantised tokens, in words; empty while there are none.
    """

    layers: tuple[LayerMemory, ...]
    attention: str = ""

    @property
    def nbytes(self) -> int:
        """All bytes of the cache."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part, over all layers."""
        return {part: sum(layer.parts.get(part, 0) for layer in self.layers) for part in PARTS}

    @property
    def devices(self) -> dict[str, int]:
        """Bytes by the device that they lie on, over all layers."""
        names = dict.fromkeys(name for layer in self.layers for name in layer.devices)
        return {name: sum(layer.devices.get(name, 0) for layer in self.layers) for name in names}

    @property
    def bits_per_element(self) -> float | None:
        """Stored bits (codes, scales, offsets, tables, outliers) over quantised numbers; None while there are none."""
        elements = sum(layer.quantized_elements for layer in self.layers)
        return 8 * sum(self.parts[part] for part in STORED) / elements if elements else None

    def to_dict(self) -> dict[str, object]:
        """Return plain builtins."""
        return {
            "nbytes": self.nbytes,
            "bits_per_element": self.bits_per_element,
            "parts": self.parts,
            "devices": self.devices,
            "attention": self.attention or None,
            "layers": [
                {
                    "layer": layer.layer,
                    "tokens": layer.tokens,
                    "quantized_tokens": layer.quantized_tokens,
                    "outlier_share": layer.outlier_share,
                    "nbytes": layer.nbytes,
                    "bits_per_element": layer.bits_per_element,
                    "parts": dict(layer.parts),
                    "devices": dict(layer.devices),
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        used = [part for part in PARTS if self.parts[part]]
        table = Table(box=SIMPLE_HEAD, show_footer=True, pad_edge=False)
        footers = ["all", "", "", *(format_bytes(self.parts[part]) for part in used), format_bytes(self.nbytes)]
        headers = ["layer", "tokens", "quantised", *used, "total", "bits"]
        for header, footer in zip(headers, [*footers, _bits(self.bits_per_element)], strict=True):
            table.add_column(header, footer, justify="right", no_wrap=True)
        for layer in self.layers:
            sizes = [format_bytes(layer.parts.get(part, 0)) for part in used]
            counts = [str(layer.layer), str(layer.tokens), str(layer.quantized_tokens)]
            table.add_row(*counts, *sizes, format_bytes(layer.nbytes), _bits(layer.bits_per_element))
        console = Console(width=200, color_system=None, force_terminal=False)
        with console.capture() as text:
            console.print(table)
        lines = [line.rstrip() for line in text.get().strip("\n").splitlines()]
        if shares := sorted({layer.outlier_share for layer in self.layers if layer.outlier_share}):
            lines.append(f"outliers: {' or '.join(f'{share:.1%}' for share in shares)} of quantised tokens kept exact")
        if len(self.devices) > 1:
            lines.append(", ".join(f"{name}: {format_bytes(size)}" for name, size in self.devices.items()))
        return "\n".join([*lines, f"attention: {self.attention}"] if self.attention else lines)


def format_bytes(count: int) -> str:
    """Return a count of bytes as people write it, in powers of 1024."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _bits(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.2f}"

"""Quantizers that tests register as backends of their own, and the attention that all others are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvquant.engine.packing import widths_of
from kvquant.plugin import Opaque, QuantizedRows, Scheme
from kvquant.plugin.capabilities import TRELLIS_WIDTHS

#: Options of a config whose model is made in no time, without an end of text, so that it generates as long as asked.
SMALL_MODEL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}


class MinMax:
    """The simplest affine quantiser; written out here so that tests do not lean on the backend they test."""

    def __init__(self, scheme: Scheme) -> None:
        self.levels = 2**scheme.nbits - 1

    def grid(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rows in float32 or wider, and their scale and offset, safe for rows as wide as the type."""
        numbers = rows if rows.dtype == torch.float64 else rows.float()
        low, high = numbers.amin(1), numbers.amax(1)
        limit = torch.finfo(numbers.dtype).max / self.levels * (1 - 1e-6)
        return numbers, (high / self.levels - low / self.levels).clamp(max=limit), low

    def codes(self, numbers: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes."""
        steps = (numbers - offset[:, None]) / torch.where(scale > 0, scale, 1)[:, None]
        return steps.round().clamp(0, self.levels).to(torch.uint8)

    def quantize(self, rows: torch.Tensor) -> QuantizedRows:
        numbers, scale, offset = self.grid(rows)
        return QuantizedRows(self.codes(numbers, scale, offset), scale, offset)


class UniformCodebook(MinMax):
    """A codebook quantiser: nearest entry of an even table from -1 to 1, scaled by the largest magnitude."""

    def quantize(self, rows: torch.Tensor) -> QuantizedRows:
        numbers = rows if rows.dtype == torch.float64 else rows.float()
        table = torch.linspace(-1, 1, self.levels + 1, dtype=numbers.dtype, device=rows.device)
        scale = numbers.abs().amax(1)
        unit = numbers / torch.where(scale > 0, scale, 1)[:, None]
        codes = ((unit + 1) / 2 * self.levels).round().clamp(0, self.levels)
        return QuantizedRows(codes.to(torch.uint8), scale, table=table)


class GreedyTrellis(MinMax):
    """A trellis quantiser that takes each number's nearest level of those that the numbers before it leave.

    Its register is as long as one may be. Rows along the tokens have an offset, and those along the channels none.
    """

    taps = (0o503, 0o254)

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.shifted = scheme.axis == "channel"

    def quantize(self, rows: torch.Tensor) -> QuantizedRows:
        numbers = rows if rows.dtype == torch.float64 else rows.float()
        offset = numbers.mean(1) if self.shifted else torch.zeros_like(numbers[:, 0])
        scale = (numbers - offset[:, None]).abs().amax(1)
        unit = (numbers - offset[:, None]) / torch.where(scale > 0, scale, 1)[:, None]
        table = torch.linspace(-1, 1, 2 * (self.levels + 1), dtype=numbers.dtype, device=rows.device)
        odd = torch.tensor([number.bit_count() % 2 for number in range(512)], device=rows.device)
        every = torch.arange(self.levels + 1, device=rows.device)
        codes = torch.zeros(rows.shape, dtype=torch.uint8, device=rows.device)
        register = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for at in range(rows.shape[1]):
            after = (register[:, None] << 1 | every & 1) & 511
            high, low = (odd[after & tap] for tap in self.taps)
            best = (table[4 * (every >> 1) + 2 * high + low] - unit[:, at, None]).abs().argmin(1)
            codes[:, at] = best.to(torch.uint8)
            register = after.gather(1, best[:, None])[:, 0]
        return QuantizedRows(codes, scale, offset if self.shifted else None, table, self.taps)


class OpaqueMinMax(MinMax):
    """The affine quantiser in a format of its own: codes of 1, 2 and 4 bits two to a byte, those of 8 one."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.group_size, self.packs = scheme.group_size, scheme.nbits <= 4

    def quantize(self, rows: torch.Tensor) -> Opaque:  # type: ignore[override]
        plain = super().quantize(rows)
        assert plain.offset is not None
        codes = packed_nibbles(plain.codes) if self.packs else plain.codes
        return Opaque({"codes": codes, "scale": plain.scale, "offset": plain.offset}, {"made": "here"})

    def dequantize(self, packed: Opaque) -> torch.Tensor:
        codes = packed.tensors["codes"]
        if self.packs:
            codes = unpacked_nibbles(codes, self.group_size)
        return codes * packed.tensors["scale"][:, None] + packed.tensors["offset"][:, None]


def packed_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return codes below 16, uint8 ``[n_groups, group_size]``, two to a byte: ``[n_groups, (group_size + 1) // 2]``."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return even[:, ::2] | even[:, 1::2] << 4


def unpacked_nibbles(packed: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return what `packed_nibbles` packed."""
    return torch.stack((packed & 0xF, packed >> 4), dim=2).flatten(1)[:, :group_size]


def random_codes(shape: tuple[int, ...], nbits: float, seed: int) -> Tensor:
    """Return random codes, uint8 of `shape`, rows of which `nbits` bits can hold."""
    wide, narrow = 2 ** widths_of(nbits)[0], 2 ** widths_of(nbits)[-1]
    codes = torch.randint(0, wide, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes[..., shape[-1] // 2 :] &= narrow - 1
    return codes


def whole_width(nbits: int, kind: str) -> int:
    """Return `nbits`, or the most that a format has."""
    return min(nbits, max(TRELLIS_WIDTHS)) if kind == "trellis" else nbits


def possible_width(nbits: float, kind: str, axis: str, group_size: int, head_dim: int) -> float:
    """Return `nbits`, or the nearest width that can be."""
    if kind == "trellis":
        return whole_width(int(nbits), kind)
    halves_fit = axis == "channel" or head_dim // 2 % group_size == 0
    return nbits if kind != "opaque" and halves_fit and head_dim % 2 == 0 else int(nbits)


def possible_options(options: dict[str, Any], key_dim: int, value_dim: int) -> dict[str, Any]:
    """Return options of a cache, with widths that can be."""
    kind, group_size = options["backend"].removeprefix("test-"), options["group_size"]
    widths = {
        f"nbits_{stream}": possible_width(
            options[f"nbits_{stream}"], kind, options[f"axis_{stream}"], group_size, head_dim
        )
        for stream, head_dim in (("key", key_dim), ("value", value_dim))
    }
    return options | widths


FORMATS = {"affine": MinMax, "codebook": UniformCodebook, "trellis": GreedyTrellis, "opaque": OpaqueMinMax}


def exact_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in float64, by its definition; arguments are those of `kvquant.attention.tiles.attend`."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (states.double().repeat_interleave(groups, dim=1) for states in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        sink = sinks.double().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores, values = torch.cat([scores, sink], 3), torch.nn.functional.pad(values, (0, 0, 0, 1))
    return scores.softmax(3).nan_to_num() @ values  # NaN where all is hidden: there attention gives zeros


class Largest(TorchDispatchMode):
    """Notes the bytes of every tensor that is made and does not end up in `kept`."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given_ = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given_:
                self.made.append((tensor.untyped_storage().data_ptr(), tensor.nbytes))
        return out

    def temporary(self, layer):
        kept = {tensor.untyped_storage().data_ptr() for store in layer.stores for _, tensor, _ in store.parts()}
        return max(nbytes for address, nbytes in self.made if address not in kept)

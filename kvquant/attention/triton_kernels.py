"""Attention over the packed pages of a body in Triton: `attend_body`, a `kvquant.attention.parts.Kernel`.

Here is what the host does: it decides how each side is read, cuts the tokens into splits and allocates what they
leave. `triton_device` holds what runs on the device, and says how it multiplies. Triton is imported on first use.

The work of one program is one key/value head, all its query rows up to 16 at a time (so heads of a group share what is
unpacked), and a run of tiles of tokens (Flash-Decoding, Dao et al., 2023). How a side reads its scales:

- `CHANNEL`: the channel axis, where groups are whole tiles. A tile has one row of scales, multiplied into the query
  (keys) or into what the tile adds (values): a few operations a tile row, none a code.
- `TOKEN`: the token axis with few groups. Scales of a token multiply its scores (keys) or softmax weights (values).
- `GENERAL`: all else (groups that do not divide a tile, very many groups). Every code takes its own scale, found by its
  index, so 4 to 8 bytes more come from L1 for each code: right for every shape, and some times slower.

NaN in spare capacity is never read, and NaN in what is read comes out.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvquant.attention.parts import Part, Segment, query_tokens, segments
from kvquant.engine.body import Body
from kvquant.engine.packing import packed_bytes, widths_of
from kvquant.engine.pages import CanonicalPage
from kvquant.engine.trellis import Taps

LARGEST_HEAD_DIM = 256

_CHANNEL, _TOKEN, _GENERAL = 0, 1, 2

#: Query rows of a program at most; more share a tile in several programs, and its bytes in L2.
_ROWS = 16
#: Rows of a product at most, once query rows are expanded by groups and terms: more would not fit the registers.
_EXPANDED_ROWS = 32
#: Rows of a product at least, which tensor cores want.
_FEWEST_ROWS = 16
#: Programs for each multiprocessor: enough to hide latency, and to even out the last wave.
_PROGRAMS_PER_SM = 4
#: Multiprocessors under the interpreter: few, for speed, and more than one, so that splits are merged.
_INTERPRETED_SMS = 2
#: Tiles that are worth a program of their own: below, starting it and merging it cost more than it saves.
_FEWEST_TILES = 2
#: Slots merged at once.
_MERGE_STEP = 16


def why_not(keys: Body, values: Body) -> str:
    """Return why `attend_body` cannot do these, in words that follow "because"; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'kvquant[fused]')"
    if keys.device.type != "cuda" and not _interpreted():
        return f"triton needs a CUDA device, and the quantised tokens are on {keys.device}"
    if keys.device.type == "cuda" and torch.cuda.get_device_capability(keys.device) < (8, 0):
        return "the device has no bfloat16 tensor cores (compute capability 8.0)"
    if keys.device != values.device:
        return f"keys are on {keys.device} and values on {values.device}"
    if torch.float64 in (keys.encoder.dtype, values.encoder.dtype):
        return "it computes in float32, and the cache in float64"
    pages = [page for body in (keys, values) for page in body.pages]
    if not all(isinstance(page, CanonicalPage) for page in pages):
        return "only the backend can read pages of an opaque format"
    widest = max((page.head_dim for page in pages if isinstance(page, CanonicalPage)), default=0)
    if widest > LARGEST_HEAD_DIM:
        return f"heads have {widest} channels, and it reads {LARGEST_HEAD_DIM} at most"
    return ""


def attend_body(
    query: Tensor,
    keys: Body,
    values: Body,
    mask: Tensor | None,
    last: Tensor | None,
    softcap: float | None = None,
    shift: Tensor | None = None,
) -> Part:
    """Attend over the quantised tokens of a layer; arguments and result are those of `parts.Kernel`."""
    with torch.cuda.device_of(query):  # triton launches on the current device, whichever the tensors are on
        return _attend(query, keys, values, mask, last, softcap, shift)


def _attend(
    query: Tensor,
    keys: Body,
    values: Body,
    mask: Tensor | None,
    last: Tensor | None,
    softcap: float | None,
    shift: Tensor | None,
) -> Part:
    from kvquant.attention import triton_device

    query = query.contiguous()
    batch, kv_heads, rows, _ = query.shape
    row_block = min(_power_of_two(rows), _ROWS)
    row_blocks = -(-rows // row_block)
    programs = _PROGRAMS_PER_SM * _multiprocessors(query.device) // (batch * kv_heads * row_blocks)
    launches = [_launch(segment, row_block, programs, len(keys)) for segment in segments(keys, values)]
    slots = sum(launch.splits for launch in launches)
    value_dim = launches[0].values.head_dim

    parts = _empty(query, (batch * kv_heads, slots, rows), value_dim)
    limits = {
        "CAPPED": softcap is not None,
        "MASKED": mask is not None,
        "BOOLEAN": mask is not None and mask.dtype == torch.bool,
    }
    shown, strides = _mask_arguments(mask)
    shift = None if shift is None else shift.contiguous()
    queries = query_tokens(rows, mask, last)
    slot = 0
    for launch in launches:
        segment = launch.segment
        triton_device.attend_split[(launch.splits, batch * kv_heads, row_blocks)](
            query, shown, last, softcap or 0.0, shift, *parts,
            *launch.keys.arguments, segment.key_start, *launch.values.arguments, segment.value_start, *strides,
            segment.start, segment.stop - segment.start, launch.front, launch.tiles, slot, slots,
            rows, queries, kv_heads,
            **limits, LIMITED=last is not None, TILE=launch.tile, RB=row_block, num_stages=launch.stages,
            **launch.keys.constants("K", row_block), **launch.values.constants("V", row_block),
        )  # fmt: skip
        slot += launch.splits
    merged = parts
    if slots > 1:
        merged = _empty(query, (batch * kv_heads, rows), value_dim)
        triton_device.merge_splits[(rows, batch * kv_heads)](
            *parts, *merged, slots, rows, V_DIM=value_dim, V_POW=_power_of_two(value_dim), STEP=_MERGE_STEP
        )
    shape = (batch, kv_heads, rows)
    return Part(merged[0].view(shape), merged[1].view(shape), merged[2].view(*shape, value_dim))


def _empty(query: Tensor, shape: tuple[int, ...], value_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for parts: highest and total ``[*shape]``, mixed ``[*shape, value_dim]``."""
    return query.new_empty(shape), query.new_empty(shape), query.new_empty((*shape, value_dim))


def _mask_arguments(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """Return a mask as the kernel reads it and its five strides, 0 where it is broadcast."""
    if mask is None:
        return None, (0, 0, 0, 0, 0)
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask, strides


# ------------------------------------------------------------------------------------------------ one launch


@dataclass(frozen=True, eq=False)
class _Side:
    """The keys or the values of a segment, as the kernel reads them."""

    page: CanonicalPage
    mode: int

    @property
    def head_dim(self) -> int:
        return self.page.head_dim

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Tensors, and strides of batch rows and heads in codes, scales, positions of outliers; rows are dense."""
        page = self.page
        positions = None if page.outliers is None else page.outliers.positions
        strides = (*page.codes.stride()[:2], *page.scale.stride()[:2])
        strides = (*strides, *((0, 0) if positions is None else positions.stride()[:2]))
        return page.codes, page.scale, page.offset, page.table, positions, *strides

    @property
    def exact(self) -> bool:
        """Whether what is multiplied is exact in 16 bits: codes are; entries of a codebook, and products, are not."""
        return self.page.table is None and self.mode != _GENERAL

    def constants(self, prefix: str, row_block: int) -> dict[str, Any]:
        """Return what the kernel is compiled for."""
        scheme, stride, outliers = self.page.scheme, self.page.codes.shape[3], self.page.outliers
        taps = self.page.taps or Taps(0, 0)
        upper, lower = widths_of(self.page.nbits)[0], widths_of(self.page.nbits)[-1]
        planes = {1: 8, 2: 4, 3: 4, 4: 2, 8: 1}[lower]
        row = packed_bytes(self.head_dim, 2 if lower == 3 else lower)
        groups = _power_of_two(self.head_dim // scheme.group_size) if self.mode == _TOKEN else 1
        # Three terms of a number take four rows, as a power of two is wanted.
        terms = 4 if self.exact and row_block * groups * 4 <= _EXPANDED_ROWS else 1
        constants = {
            "BITS": upper, "LOWER": lower, "BOOK": self.page.table is not None, "MODE": self.mode,
            "BY_CHANNEL": scheme.axis == "channel", "DIM": self.head_dim, "GROUP": scheme.group_size,
            "STRIDE": stride, "ROW": row, "PAD": max(_power_of_two(row), _FEWEST_ROWS), "PLANES": planes,
            "TERMS": terms, "GROUPS": groups, "EXPAND": max(groups * terms, _FEWEST_ROWS // row_block),
            "EXACT": self.exact, "KEPT": 0 if outliers is None else outliers.kept,
            "BLOCK": 1 if outliers is None else outliers.block,
            "SHIFTED": self.page.offset is not None, "HIGH": taps.high, "LOW": taps.low,
        }  # fmt: skip
        return {f"{prefix}_{name}": value for name, value in constants.items()}


@dataclass(frozen=True, eq=False)
class _Launch:
    """One segment: `splits` programs a head, of `tiles` tiles of `tile` tokens, `front` of the first not its own."""

    segment: Segment
    keys: _Side
    values: _Side
    tile: int
    front: int
    tiles: int
    splits: int

    @property
    def stages(self) -> int:
        """Tiles loaded at once, as far as the shared memory goes.

        Where scales are loaded for each number that is one. Of a trellis the bytes of the numbers before take as much
        again for each tap.
        """
        if _GENERAL in (self.keys.mode, self.values.mode):
            return 1
        return 2 if self.segment.keys.taps or self.segment.values.taps else 3


def _launch(segment: Segment, row_block: int, programs: int, tokens: int) -> _Launch:
    """Decide how a segment is read.

    Args:
        segment: the tokens.
        row_block: query rows of a program.
        programs: programs that a head should have in all, for the `tokens` of the body.
    """
    starts = segment.key_start, segment.value_start
    pages = segment.keys, segment.values
    sizes = [page.scheme.group_size for page in pages if page.scheme.axis == "channel"]
    # A tile of 64 tokens keeps every warp busy; groups of 32 (KIVI's) are worth tiles of 32.
    tile = 64 if any(size % 64 == 0 for size in sizes) or not any(size % 32 == 0 for size in sizes) else 32
    if max(page.head_dim for page in pages) > 128 and not all(page.table is None for page in pages):
        tile = 32  # float32 operands of wide heads would not fit the registers
    # Tiles begin where groups of the first channel side do. Pages of both sides begin at whole blocks, so groups of the
    # other do too; if ever not, that side is read number by number.
    aligned = [start for page, start in zip(pages, starts, strict=True) if page.scheme.axis == "channel"]
    front = aligned[0] % tile if aligned else 0
    modes = [_mode(page, start, tile, front, row_block) for page, start in zip(pages, starts, strict=True)]
    count = -(-(segment.stop - segment.start + front) // tile)
    share = -(-max(1, programs) * (segment.stop - segment.start) // tokens)
    tiles = max(_FEWEST_TILES, -(-count // share))
    sides = [_Side(page, mode) for page, mode in zip(pages, modes, strict=True)]
    return _Launch(segment, sides[0], sides[1], tile, front, tiles, -(-count // tiles))


def _mode(page: CanonicalPage, start: int, tile: int, front: int, row_block: int) -> int:
    group_size = page.scheme.group_size
    if page.scheme.axis == "channel":
        return _CHANNEL if group_size % tile == 0 and start % tile == front else _GENERAL
    groups = _power_of_two(page.head_dim // group_size)
    return _TOKEN if row_block * groups <= _EXPANDED_ROWS else _GENERAL


# ------------------------------------------------------------------------------------------------ the machine


def _interpreted() -> bool:
    """Whether triton was imported to interpret its kernels, on tensors in host memory."""
    from kvquant.attention import triton_device

    return bool(triton_device.INTERPRETED)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()

"""Attention over packed pages on the CPU, compiled by numba: codes become numbers in registers only.

For each key/value head a block of tokens is scored, weighed and mixed while it is in the cache, and all query heads
that share the head use the codes that were unpacked for the first. Blocks are merged by online softmax (see `parts`).

A kernel is compiled for each kind of stream and number of rows, once; numba keeps it on disk. It works on addresses,
so that starting one costs little. It runs on torch's own threads (see `threads`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, types
from torch import Tensor

from kvquant.attention import numba_blocks, numba_pages, numba_scores, numba_trellis, simd, simd_rows, threads
from kvquant.attention.numba_blocks import (
    Work,
    mix_by_channel,
    mix_by_token,
    score_by_channel,
    score_by_token,
    weigh,
)
from kvquant.attention.numba_pages import BYTES, FIRST, FLOATS, HALVES, PAGE, ROW, START, STOP, codes_of
from kvquant.attention.numba_scores import LOWEST, MASK
from kvquant.attention.numba_trellis import expand, index_bits
from kvquant.attention.parts import Part, Segment, segments
from kvquant.attention.simd import next_share, pointer_to
from kvquant.attention.simd_rows import HALF_TABLE, LANES
from kvquant.engine.body import Body
from kvquant.engine.packing import packed_bytes, table_sizes
from kvquant.engine.pages import CanonicalPage

#: Tokens that are scored before they are mixed: their scores, weights and codes stay in the first cache.
_BLOCK = 256
#: Room for more tokens, never used: rows of scores would else begin at addresses that the processor takes for the same.
_PADDING = 16
#: Query rows that share unpacked codes.
_MOST_ROWS = 4
#: Numbers read below which threads cost more than they bring.
_WORTH_THREADS = 1 << 18
#: Shares of the work for each thread, at least: one that is held up leaves its shares to the others.
_SHARES_EACH = 4
#: Entries of a table for the kernel, which looks codes of up to four bits up in registers.
_FEWEST_ENTRIES = LANES

#: What a kernel is told: how many shares have been taken, sizes, and addresses. `pages` are int64 ``[segments, 2 (keys,
#: values), fields]``, see `numba_pages.PAGE`; queries ``[batches, heads, rows, width]``, and what is added to
#: their scores before the cap ``[batches, heads, rows]``; what is written has slots before the rows, one for each
#: stretch of tokens.
JOB = ("taken batches heads slots rows tokens query segments pages masked cap shift highest total mixed").split()
(
    TAKEN, BATCHES, HEADS, SLOTS, ROWS, TOKENS, QUERY, SEGMENTS, PAGES, MASKED, CAP, SHIFT, HIGHEST, TOTAL, MIXED,
) = range(len(JOB))  # fmt: skip
PAGE_FIELDS, MASK_FIELDS = len(PAGE), len(MASK)


#: How `numba_pages.fetch` tells the types of scales apart.
_STORED = {torch.float32: FLOATS, torch.float16: HALVES, torch.uint8: BYTES}


@dataclass(frozen=True)
class Stream:
    """What the loops over keys, or over values, are compiled for.

    Attributes:
        width: head_dim.
        nbits, group: of the scheme.
        channel: whether tokens share a scale.
        entries: entries of the table, or of each half's, 0 for the affine format.
        shifted: whether scales have offsets.
        taps: of the trellis, zeros where there is none.
    """

    width: int
    nbits: float
    group: int
    channel: bool
    entries: int
    shifted: bool
    taps: tuple[int, int]

    @classmethod
    def of(cls, page: CanonicalPage) -> Stream:
        """Return what a page needs."""
        scheme = page.scheme
        entries = 0 if page.table is None else _entries(page)
        shifted, taps = page.offset is not None, page.taps or (0, 0)
        return cls(
            page.head_dim,
            page.nbits,
            scheme.group_size,
            scheme.axis == "channel",
            entries,
            shifted,
            (taps[0], taps[1]),
        )

    @property
    def row_bits(self) -> float:
        """Bits of what the rows hold that are read: codes, or the indices that those of a trellis become."""
        return index_bits(int(self.nbits)) if any(self.taps) else self.nbits

    @property
    def half_bits(self) -> int:
        """How `simd.dot_rows` and `simd.mix_rows` are told what rows are read."""
        return int(2 * self.row_bits)

    @property
    def expanded(self) -> int:
        """Bytes of a row of indices, 0 where codes are no trellis's."""
        return packed_bytes(self.width, self.row_bits) if any(self.taps) else 0


#: What numba compiles into a kernel and does not watch.
_COMPILED = (simd_rows, simd, numba_pages, numba_scores, numba_blocks, numba_trellis)


@cache
def _sources() -> int:
    """Return a number that changes with the files that numba compiles but does not watch."""
    text = b"".join(Path(module.__file__ or "").read_bytes() for module in _COMPILED)
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "little")


@cache
def _kernel(key: Stream, value: Stream, rows: int) -> threads.Task:  # noqa: C901 # one loop, compiled whole
    """Compile the kernel for these streams and `rows` query rows at once, or load it from disk.

    It takes the address of int64 numbers, see `JOB`, and works on shares of the job until none is left, beside other
    threads that do the same.
    """
    k_width, k_bits, k_per, k_table = key.width, int(key.nbits), key.group, key.entries
    v_width, v_bits, v_per, v_table = value.width, int(value.nbits), value.group, value.entries
    k_shifted, v_shifted, k_read, v_read = key.shifted, value.shifted, key.half_bits, value.half_bits
    (k_high, k_low), (v_high, v_low) = key.taps, value.taps
    expanded = max(key.expanded, value.expanded)
    k_groups = 1 if key.channel else k_width // k_per
    v_groups = 1 if value.channel else v_width // v_per
    # Flags, and not the functions that they choose between: numba finds a kernel on disk by all that it closes over,
    # and a compiled function is another one in every process. Branches that flags rule out are not compiled.
    k_channel, v_channel = key.channel, value.channel
    block, room, groups = _BLOCK, _BLOCK + _PADDING, max(k_groups, v_groups)
    scales = max(k_width, v_width, block * groups)
    k_span, v_span = k_width // k_groups, v_width // v_groups
    made_from = _sources()

    @cfunc(types.void(types.CPointer(types.int64)), nopython=True, cache=True, fastmath=True)
    def kernel(job: Any) -> None:  # noqa: C901 # as above
        batches, heads, slots, all_rows = job[BATCHES], job[HEADS], job[SLOTS], job[ROWS]
        query = carray(pointer_to(job[QUERY], 1), (batches, heads, all_rows, k_width))
        pages = carray(pointer_to(job[PAGES], 3), (job[SEGMENTS], 2, PAGE_FIELDS))
        mask = carray(pointer_to(job[MASKED], 3), (MASK_FIELDS,))
        cap = carray(pointer_to(job[CAP], 1), (1,))[0]
        shift = carray(pointer_to(job[SHIFT], 1), (batches, heads, all_rows))
        highest = carray(pointer_to(job[HIGHEST], 1), (batches, heads, slots, all_rows))
        total = carray(pointer_to(job[TOTAL], 1), (batches, heads, slots, all_rows))
        mixed = carray(pointer_to(job[MIXED], 1), (batches, heads, slots, all_rows, v_width))
        bits = np.empty(room if made_from else 0, np.int32)
        work = Work(
            np.empty((rows, k_width), np.float32),
            np.empty(rows, np.float32),
            np.empty((rows, k_groups), np.float32),
            np.empty((k_groups, rows, room), np.float32),
            np.empty((rows, room), np.float32),
            np.empty((v_groups, rows, room), np.float32),
            np.empty(scales, np.float32),
            np.empty(scales, np.float32),
            np.empty((groups, room), np.float32),
            np.empty((groups, room), np.float32),
            bits,
            bits.view(np.float32),
            np.empty((rows, v_width), np.float32),
            np.empty((rows, v_width), np.float32),
            np.empty((rows, v_groups), np.float32),
            np.empty(rows, np.float32),
            np.empty(rows, np.float32),
            np.empty((block if expanded else 1, expanded), np.uint8),
        )
        share = next_share(job)
        while share < batches * heads * slots:
            batch, head, slot = share // (heads * slots), share // slots % heads, share % slots
            first, last = job[TOKENS] * slot // slots, job[TOKENS] * (slot + 1) // slots
            for first_row in range(0, all_rows, rows):
                own = query[batch, head, first_row : first_row + rows]
                for r in range(rows):
                    for g in range(k_groups):
                        work.query_sums[r, g] = own[r, g * k_span : (g + 1) * k_span].sum()
                work.sums[:] = 0
                work.offset_sums[:] = 0
                work.total[:] = 0
                work.highest[:] = LOWEST
                for segment in range(pages.shape[0]):
                    keys, values = pages[segment, 0], pages[segment, 1]
                    begin, end = keys[START], keys[STOP]
                    for start in range(max(begin, first), min(end, last), block):
                        count = min(block, min(end, last) - start)
                        k_at, v_at = keys[FIRST] + start - begin, values[FIRST] + start - begin
                        codes, apart = codes_of(keys, batch, head, k_at), keys[ROW]
                        if k_high:
                            expand(
                                keys, codes, k_at, count, work, k_width, k_bits, k_per, k_channel, k_high, k_low,
                            )  # fmt: skip
                            codes, apart = work.expanded.ctypes.data, expanded
                        if k_channel:
                            score_by_channel(
                                work, keys, own, batch, head, k_at, count, codes, apart, k_width, k_read, k_per, rows,
                                k_table, k_shifted, room,
                            )  # fmt: skip
                        else:
                            score_by_token(
                                work, keys, own, batch, head, k_at, count, codes, apart, k_width, k_read, k_per, rows,
                                k_table, k_shifted, room,
                            )  # fmt: skip
                        weigh(
                            work, mask, cap, shift[batch, head, first_row : first_row + rows], batch, head, first_row,
                            start, count, v_width, v_groups, rows, keys, k_at, values, v_at,
                        )  # fmt: skip
                        codes, apart = codes_of(values, batch, head, v_at), values[ROW]
                        if v_high:
                            expand(
                                values, codes, v_at, count, work, v_width, v_bits, v_per, v_channel, v_high, v_low,
                            )  # fmt: skip
                            codes, apart = work.expanded.ctypes.data, expanded
                        if v_channel:
                            mix_by_channel(
                                work, values, batch, head, v_at, count, codes, apart, v_width, v_read, v_per, rows,
                                v_table, v_shifted, room,
                            )  # fmt: skip
                        else:
                            mix_by_token(
                                work, values, batch, head, v_at, count, codes, apart, v_width, v_read, v_per, rows,
                                v_table, v_shifted, room,
                            )  # fmt: skip
                for r in range(rows):
                    highest[batch, head, slot, first_row + r] = work.highest[r]
                    total[batch, head, slot, first_row + r] = work.total[r]
                    for g in range(v_groups):
                        for d in range(g * v_span, (g + 1) * v_span):
                            mixed[batch, head, slot, first_row + r, d] = work.sums[r, d] + work.offset_sums[r, g]
            share = next_share(job)

    return threads.Task(kernel.address, kernel)


def why_not(keys: Body, values: Body) -> str:
    """Return why the kernel cannot attend over these bodies, or an empty string."""
    if keys.device.type != "cpu" or values.device.type != "cpu":
        return "it runs on the CPU only"
    for body in (keys, values):
        if not all(isinstance(page, CanonicalPage) for page in body.pages):
            return "the backend's format is opaque"
        if torch.promote_types(body.encoder.dtype, torch.float32) != torch.float32:
            return f"it computes in float32, and {body.encoder.dtype} was asked for"
        if len({Stream.of(page) for page in body.pages if isinstance(page, CanonicalPage)}) > 1:
            return "the backend returned several formats"
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
    """Attend over bodies for which `why_not` has no reason; see `parts.Kernel`."""
    batch, heads, queries, _ = query.shape
    found = list(segments(keys, values))
    key, value = Stream.of(found[0].keys), Stream.of(found[0].values)
    tiles = -(-queries // _MOST_ROWS)
    rows = -(-queries // tiles)
    spare = rows * tiles - queries
    asked = torch.nn.functional.pad(query, (0, 0, 0, spare)).contiguous()

    team = torch.get_num_threads() if len(keys) * batch * heads * key.width >= _WORTH_THREADS else 1
    slots = -(-team * _SHARES_EACH // (batch * heads)) if team > 1 else 1
    highest = torch.empty((batch, heads, slots, rows * tiles), dtype=torch.float32)
    total, mixed = torch.empty_like(highest), highest.new_empty((*highest.shape, value.width))
    tables: list[Tensor] = []
    pages = np.array([_described(segment, tables) for segment in found], dtype=np.int64)
    described, masks = _described_mask(mask, last, len(keys))
    cap = np.array([softcap or 0], dtype=np.float32)
    if shift is None:
        shifts = asked.new_zeros(asked.shape[:3])  # float32 like the query, whatever the default type
    else:
        shifts = torch.nn.functional.pad(shift, (0, spare)).contiguous()
    job = np.array(
        [
            0, batch, heads, slots, rows * tiles, len(keys), asked.data_ptr(), len(found), pages.ctypes.data,
            described.ctypes.data, cap.ctypes.data, shifts.data_ptr(), highest.data_ptr(), total.data_ptr(),
            mixed.data_ptr(),
        ],
        dtype=np.int64,
    )  # fmt: skip
    threads.run(_kernel(key, value, rows), job.ctypes.data, team)
    del tables, masks  # the kernel had only their addresses
    if mask is not None or last is not None or keys.encoder.kept:
        highest = highest.masked_fill_(total == 0, -torch.inf)
    part = _joined(highest, total, mixed)
    return Part(part.highest[:, :, :queries], part.total[:, :, :queries], part.mixed[:, :, :queries])


def _joined(highest: Tensor, total: Tensor, mixed: Tensor) -> Part:
    """Join the slots ``[batch, kv_heads, slots, rows]`` of one head's tokens."""
    if highest.shape[2] == 1:
        return Part(highest[:, :, 0], total[:, :, 0], mixed[:, :, 0])
    top = highest.amax(2)
    weight = (highest - top.masked_fill(top == -torch.inf, 0.0).unsqueeze(2)).exp()
    return Part(top, (total * weight).sum(2), (mixed * weight.unsqueeze(-1)).sum(2))


def _described(segment: Segment, tables: list[Tensor]) -> list[list[int]]:
    """Return the pages of a segment in integers, see `numba_pages.PAGE`; tables made for it go to `tables`."""
    where = [segment.start, segment.stop]
    streams = ((segment.keys, segment.key_start), (segment.values, segment.value_start))
    return [[*_described_page(page, first, tables), *where] for page, first in streams]


def _entries(page: CanonicalPage) -> int:
    """Return how many entries of a page's table, or of each half's, the kernel is given; they repeat."""
    sizes = table_sizes(page.nbits, page.taps)
    return max(_FEWEST_ENTRIES if len(sizes) == 1 else HALF_TABLE, sizes[0])


def _described_page(page: CanonicalPage, first: int, tables: list[Tensor]) -> list[int]:
    table = 0
    if page.table is not None:
        halves = page.table.float().split(table_sizes(page.nbits, page.taps))
        tables.append(torch.cat([half.repeat(_entries(page) // len(half)) for half in halves]))
        table = tables[-1].data_ptr()
    outliers = [0, 0, 0, 0, 1]
    if page.outliers is not None:
        positions = page.outliers.positions
        outliers = [positions.data_ptr(), *positions.stride()[:2], page.outliers.kept, page.outliers.block]
    return [
        page.codes.data_ptr(),
        *page.codes.stride()[:3],
        page.scale.data_ptr(),
        *page.scale.stride()[:2],
        0 if page.offset is None else page.offset.data_ptr(),
        table,
        first,
        _STORED[page.scale.dtype],
        *outliers,
    ]


def _described_mask(mask: Tensor | None, last: Tensor | None, tokens: int) -> tuple[Any, list[Tensor]]:
    """Return a mask in integers, see `numba_blocks.MASK`, and the tensors whose addresses are among them."""
    bias = seen = None
    if mask is not None and mask.dtype == torch.bool:
        seen = mask
    elif mask is not None:
        bias = mask.float().clamp(min=float(LOWEST))
        hidden = mask == -torch.inf
        seen = ~hidden if bool(hidden.any()) else None
    if last is not None:
        reached = torch.arange(tokens) <= last
        seen = reached[None, None, None] if seen is None else seen & reached
    queries = max([1, *(part.shape[3] for part in (bias, seen) if part is not None)])
    described = np.zeros(len(MASK), dtype=np.int64)
    described[-1] = queries
    for at, part in ((0, bias), (6, seen)):
        if part is not None:
            strides = (0 if size == 1 else stride for size, stride in zip(part.shape, part.stride(), strict=True))
            described[at : at + 6] = [part.data_ptr(), *strides]
    return described, [part for part in (bias, seen) if part is not None]

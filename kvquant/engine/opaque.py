"""Pages in a backend's own format, which only the backend can read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from kvquant.engine.encode import Encoder
from kvquant.engine.grouping import rows_to_states
from kvquant.engine.offload import Home
from kvquant.engine.outliers import Outliers
from kvquant.engine.pieces import EncodedOpaque, Piece
from kvquant.engine.state import Saved, Stack, State
from kvquant.errors import BackendContractError, QuantizationError
from kvquant.plugin.quantizer import Opaque
from kvquant.transforms.frame import Frame


class OpaquePage:
    """A page in a backend's own format: one `Opaque` for each block and batch row."""

    def __init__(
        self,
        encoder: Encoder,
        first_token: int,
        kv_heads: int,
        head_dim: int,
        home: Home,
        most: int | None = None,
    ) -> None:
        """Make an empty page that begins at token `first_token` of the sequence.

        Its list of blocks never fills up, unless the page is to have at most `most` tokens.
        """
        self._encoder, self._first_token, self._most = encoder, first_token, most
        self._kv_heads, self._head_dim, self._home = kv_heads, head_dim, home
        self._blocks: list[tuple[Opaque, ...]] = []
        self._outliers: list[Outliers] = []  # of each block, where there are any
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens held: a list has no spare capacity."""
        return len(self._blocks) * self._encoder.block

    @property
    def scale_bits(self) -> int:
        """Opaque blocks have no scales that the core would know of."""
        return 0

    def accepts(self, piece: Piece, at: int) -> bool:
        """Whether `piece` may be written behind token `at`."""
        fits = self._most is None or at + self._encoder.block <= self._most
        return fits and isinstance(piece, EncodedOpaque) and at % self._encoder.block == 0

    def write(self, piece: Piece, start: int, at: int) -> int:  # noqa: ARG002  # a block is written whole
        """Keep a block at token `at`, in place of what a crop or a failure left there; return its tokens."""
        block = cast("EncodedOpaque", piece)
        self.trim(at)
        self._blocks.append(tuple(_mapped(row, self._home.keep) for row in block.rows))
        if block.outliers is not None:
            self._outliers.append(block.outliers.mapped(self._home.keep))
        return block.tokens

    def discard(self) -> None:
        """Forget blocks that were written and never counted."""
        self.trim(self.length)

    def dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `start` to `stop` as ``[batch, kv_heads, stop - start, head_dim]``."""
        block = self._encoder.block
        first, last = start // block, -(-stop // block)
        states = torch.cat([self._read_block(index, dtype) for index in range(first, last)], dim=2)
        return states[:, :, start - first * block : stop - first * block]

    def with_outliers(self, states: Tensor, start: int, stop: int, frame: Frame | None) -> Tensor:
        """Return `states` with those of outlier tokens exact, see `Page`."""
        block = self._encoder.block
        for index in range(start // block, -(-stop // block) if self._outliers else 0):
            low, high = max(start, index * block), min(stop, (index + 1) * block)
            of_block = states[:, :, low - start : high - start]
            self._outliers[index].over(of_block, low - index * block, high - index * block, frame)
        return states

    def _read_block(self, index: int, dtype: torch.dtype) -> Tensor:
        encoder = self._encoder
        position = self._first_token + index * encoder.block
        shape = (1, self._kv_heads, encoder.block, self._head_dim)
        numbers = self._kv_heads * encoder.block * self._head_dim
        states = []
        for row in self._blocks[index]:
            try:
                values = encoder.read(row, numbers)
            except BackendContractError:
                raise
            except Exception as cause:
                raise QuantizationError(
                    encoder.backend, encoder.stream, position, position + encoder.block, cause, encoder.where
                ) from cause
            states.append(rows_to_states(values.to(dtype), shape, encoder.scheme.axis, encoder.scheme.group_size))
        return torch.cat(states)

    def select(self, indices: Tensor) -> None:
        """Keep batch rows `indices`, in that order; a row kept twice shares its memory."""
        order = indices.tolist()
        self._blocks = [tuple(rows[index] for index in order) for rows in self._blocks]
        self._outliers = [one.mapped(lambda tensor: tensor.index_select(0, indices)) for one in self._outliers]

    def trim(self, tokens: int) -> None:
        """Forget blocks that lie behind the first `tokens` tokens."""
        del self._blocks[-(-tokens // self._encoder.block) :]
        del self._outliers[-(-tokens // self._encoder.block) :]

    def mapped(self, change: Callable[[Tensor], Tensor], home: Home | None = None) -> OpaquePage:
        """Return the same page with other tensors, see `Page`; batch rows that share memory go on sharing it."""
        page = copy.copy(self)
        page._home = home or self._home
        rows = {id(row): row for block in self._blocks for row in block}
        made = {known: _mapped(row, change) for known, row in rows.items()}
        page._blocks = [tuple(made[id(row)] for row in block) for block in self._blocks]
        page._outliers = [one.mapped(change) for one in self._outliers]
        return page

    def parts(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield ``(part, tensor, valid bytes)`` of every tensor that the page holds."""
        for rows in self._blocks:
            for row in rows:
                for tensor in row.tensors.values():
                    yield "codes", tensor, tensor.nbytes
        for one in self._outliers:
            yield from one.parts(one.block)

    def state(self) -> State:
        """Return what the page is. Blocks of one layout are stacked, and batch rows that share one are written once.

        Raises:
            BackendContractError: a block's meta data does not survive JSON.
        """
        numbers: dict[tuple[object, ...], int] = {}
        layouts: list[list[Opaque]] = []
        places: dict[int, tuple[int, int]] = {}
        for row in (row for rows in self._blocks for row in rows):
            if id(row) not in places:
                layout = self._layout(row)
                number = numbers.setdefault(layout, len(layouts))
                if number == len(layouts):
                    layouts.append([])
                places[id(row)] = (number, len(layouts[number]))
                layouts[number].append(row)
        state = State(meta={"length": self.length})
        order = [[places[id(row)] for row in rows] for rows in self._blocks]
        state.tensors["order"] = torch.tensor(order, dtype=torch.int64)
        state.put_all("layouts", [_stacked(rows) for rows in layouts])
        if self._outliers:
            state.tensors.update(Outliers.joined(self._outliers, dim=2).tensors(self.length))
        return state

    def _own(self, tensor: Tensor) -> Tensor:
        return self._home.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def _layout(self, row: Opaque) -> tuple[object, ...]:
        """Return what two blocks must have in common to be stacked."""
        meta = dict(row.meta)
        try:
            text = json.dumps(meta, sort_keys=True)
            survives = json.loads(text) == meta
        except (TypeError, ValueError):
            survives = False
        if not survives:
            problem = f"Opaque.meta does not survive a round trip through JSON: {meta!r}"
            raise BackendContractError(self._encoder.backend, problem)
        return text, *((name, tensor.shape, tensor.dtype) for name, tensor in row.tensors.items())

    def restore(self, saved: Saved, length: int, batch: int, dtype: torch.dtype) -> None:
        """Take on a saved state, in an empty page; the backend reads one block, so that it fails now or never.

        Args:
            saved: the state.
            length: tokens.
            batch: batch rows.
            dtype: of the states.

        Raises:
            MisfitError: it is not one of a page like this.
        """
        blocks = -(-length // self._encoder.block)
        order = saved.take("order", (blocks, batch, 2), ["int64"]).tolist()
        layouts = [_unstacked(part, blocks * batch) for part in saved.parts("layouts")]
        for layout, at in (place for places in order for place in places):
            if not (0 <= layout < len(layouts) and 0 <= at < len(layouts[layout])):
                raise saved.misfit(f"has no block {at} of layout {layout}")
        moved = [[_mapped(row, self._home.keep) for row in rows] for rows in layouts]
        self._blocks = [tuple(moved[layout][at] for layout, at in places) for places in order]
        self.length = length
        if kept := self._encoder.kept:
            shape = (batch, self._kv_heads, length, self._head_dim)
            outliers = Outliers.restored(saved, shape, dtype, self._encoder.block, kept)
            self._outliers = [outliers.blocks(at, at + 1).mapped(self._own) for at in range(blocks)]
        try:
            self.dequantize(0, 1, torch.float32)
        except Exception as cause:  # the backend's own code, on data that may be anything
            raise saved.misfit(f"cannot be read by the backend {self._encoder.backend!r}: {cause}") from cause


def _stacked(rows: list[Opaque]) -> State:
    """Return the state of blocks of one layout."""
    names = list(rows[0].tensors)
    stacks = [Stack(tuple(row.tensors[name] for row in rows)) for name in names]
    tensors: dict[str, Tensor | Stack] = {f"tensors.{index}": stack for index, stack in enumerate(stacks)}
    return State(tensors, {"names": names, "meta": dict(rows[0].meta), "blocks": len(rows)})


def _unstacked(saved: Saved, most: int) -> list[Opaque]:
    """Undo `_stacked`; there are at most `most` blocks.

    Raises:
        MisfitError: there are not as many blocks, or names, as there should be.
    """
    names, meta = saved.value("names"), saved.mapping("meta")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise saved.misfit("has no names of tensors")
    if len(set(names)) != len(names):
        raise saved.misfit("names a tensor twice")
    blocks = saved.integer("blocks", 1, most)
    columns = {name: saved.take_parts(f"tensors.{index}", blocks) for index, name in enumerate(names)}
    return [Opaque({name: column[at] for name, column in columns.items()}, meta) for at in range(blocks)]


def _mapped(row: Opaque, change: Callable[[Tensor], Tensor]) -> Opaque:
    return Opaque({name: change(tensor) for name, tensor in row.tensors.items()}, row.meta)

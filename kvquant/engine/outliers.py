"""Outlier tokens: those that come back worst from quantisation, whose states are kept as they were given.

A few tokens have states unlike all others, and more bits for everything would be wasted on the rest (KVQuant, Hooper
et al., arXiv 2401.18079, keeps outlier numbers apart; here it is whole tokens). In each block, for each batch row and
head, the tokens with the largest squared error are kept beside the codes, which all tokens have. So nothing else needs
to know: positions, crops and masks are as without. Whoever reads puts the exact states in place of what codes stand
for, see `Outliers.over`; kernels leave the tokens out, and `kvquant.attention.outliers` attends to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvquant.engine.offload import Home, clone, empty_like
from kvquant.engine.state import Saved, dtype_name
from kvquant.transforms.frame import Frame


def kept_tokens(share: float, block: int) -> int:
    """Return how many tokens of a block of `block` tokens are kept where `share` of them should be; one at least."""
    return max(1, round(share * block)) if share else 0


def kept_bytes(kept: int, head_dim: int, element_size: int) -> int:
    """Return the bytes of the outliers of one block of one head: positions, and states of `element_size` bytes each."""
    return kept * (torch.int32.itemsize + head_dim * element_size)


@dataclass(eq=False)
class Outliers:
    """The outlier tokens of a run of blocks.

    Attributes:
        positions: int32 ``[batch, kv_heads, blocks, kept]``, in their block, ascending.
        states: as they were given, ``[batch, kv_heads, blocks, kept, head_dim]``.
        block: tokens of a block.
    """

    positions: Tensor
    states: Tensor
    block: int

    @classmethod
    def chosen(cls, states: Tensor, errors: Tensor, block: int, kept: int) -> Outliers:
        """Choose the tokens with the largest squared error, the earlier of two that are alike.

        The choice depends on the block alone, to the last bit: errors are summed pair by pair in a fixed order.

        Args:
            states: ``[batch, kv_heads, tokens, head_dim]``, tokens a multiple of `block`.
            errors: how far from them what comes back is, of the same shape, in the frame that they are quantised in.
            block: tokens of a block.
            kept: how many are chosen in each.
        """
        summed = _sums(errors.square()).unflatten(2, (-1, block))
        worst = summed.argsort(dim=-1, descending=True, stable=True)[..., :kept].sort(dim=-1).values
        index = worst.unsqueeze(-1).expand(*worst.shape, states.shape[3])
        return cls(worst.int(), states.unflatten(2, (-1, block)).gather(3, index), block)

    @property
    def kept(self) -> int:
        """Tokens kept of each block."""
        return self.positions.shape[3]

    # -------------------------------------------------------------------------------------------- other ones of it

    def blocks(self, start: int, stop: int) -> Outliers:
        """Return those of blocks `start` to `stop`, without a copy."""
        return Outliers(self.positions[:, :, start:stop], self.states[:, :, start:stop], self.block)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Outliers:
        """Return the same with other tensors, each of which `change` makes of one of its own."""
        return Outliers(change(self.positions), change(self.states), self.block)

    @staticmethod
    def joined(parts: Sequence[Outliers], dim: int) -> Outliers:
        """Join those of different batch rows (`dim` 0), or blocks (2)."""
        positions, states = [part.positions for part in parts], [part.states for part in parts]
        return Outliers(torch.cat(positions, dim), torch.cat(states, dim), parts[0].block)

    def room(self, tokens: int, home: Home) -> Outliers:
        """Return room at `home` for those of `tokens` tokens, with nothing in it."""
        return self.mapped(
            lambda one: home.empty((*one.shape[:2], tokens // self.block, *one.shape[3:]), one.dtype),
        )

    def write(self, source: Outliers, start: int, stop: int, at: int) -> None:
        """Write those of tokens `start` to `stop` of `source`, whole blocks, at token `at`."""
        first, last, to = start // self.block, stop // self.block, at // self.block
        self.positions[:, :, to : to + last - first] = source.positions[:, :, first:last]
        self.states[:, :, to : to + last - first] = source.states[:, :, first:last]

    def until(self, tokens: int) -> Outliers:
        """Return those of the blocks that the first `tokens` tokens lie in, without a copy."""
        return self.blocks(0, -(-tokens // self.block))

    def trimmed(self, tokens: int) -> Outliers:
        """Return a copy of those of the blocks that the first `tokens` tokens lie in."""
        return self.until(tokens).mapped(clone)

    def grown(self, tokens: int) -> Outliers:
        """Return a copy with room for `tokens` tokens, itself if it has just that."""
        blocks, held = -(-tokens // self.block), self.positions.shape[2]
        if blocks == held:
            return self
        roomy = self.mapped(lambda one: empty_like(one, (*one.shape[:2], blocks, *one.shape[3:])))
        roomy.write(self, 0, held * self.block, 0)
        return roomy

    # -------------------------------------------------------------------------------------------- reading

    def over(self, states: Tensor, start: int, stop: int, frame: Frame | None = None) -> Tensor:
        """Put the exact states over those that codes stand for.

        Args:
            states: ``[batch, kv_heads, stop - start, head_dim]``, written to.
            start, stop: the tokens that they are of.
            frame: that the states are in, None for none.
        """
        first, last = start // self.block, -(-stop // self.block)
        near = self.blocks(first, last)
        starts = torch.arange(first * self.block - start, stop - start, self.block, device=states.device)
        at = near.positions + starts[:, None]
        exact = near.states.flatten(2, 3).to(states.dtype)
        if frame is not None:
            exact = frame.enter(exact)
        exact = exact.unflatten(2, near.positions.shape[2:])
        inside = (at >= 0) & (at < stop - start)
        rows, heads, *_ = found = inside.nonzero(as_tuple=True)
        states[rows, heads, at[found]] = exact[found]
        return states

    # -------------------------------------------------------------------------------------------- held and written down

    def parts(self, tokens: int) -> Iterator[tuple[str, Tensor, int]]:
        """Yield ``(part, tensor, valid bytes)`` of its tensors, as those of a page of `tokens` tokens."""
        valid = self.until(tokens)
        yield "outliers", self.positions, valid.positions.nbytes
        yield "outliers", self.states, valid.states.nbytes

    def tensors(self, tokens: int) -> dict[str, Tensor]:
        """Return what those of a page of `tokens` tokens are, to be written down."""
        valid = self.until(tokens)
        return {"outlier_positions": valid.positions, "outlier_states": valid.states}

    @classmethod
    def restored(
        cls, saved: Saved, shape: tuple[int, int, int, int], dtype: torch.dtype, block: int, kept: int
    ) -> Outliers:
        """Return those of a page in a saved state.

        Args:
            saved: the page's state.
            shape: of its states, ``[batch, kv_heads, tokens, head_dim]``.
            dtype: of its states.
            block: tokens of a block.
            kept: how many are kept of each.

        Raises:
            MisfitError: there are none like that in it.
        """
        grid = (*shape[:2], -(-shape[2] // block), kept)
        positions = saved.take("outlier_positions", grid, ["int32"])
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < block:
            raise saved.misfit(f"has outlier_positions beyond a block of {block} tokens")
        return cls(positions, saved.take("outlier_states", (*grid, shape[3]), [dtype_name(dtype)]), block)


def _sums(numbers: Tensor) -> Tensor:
    """Return sums over the last dimension, the same to the last bit whatever else there is in the tensor."""
    while numbers.shape[-1] > 1:
        half = numbers.shape[-1] // 2
        pairs = numbers[..., :half] + numbers[..., half : 2 * half]
        numbers = torch.cat([pairs, numbers[..., 2 * half :]], dim=-1) if numbers.shape[-1] % 2 else pairs
    return numbers.squeeze(-1)

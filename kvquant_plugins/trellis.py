"""The trellis backend: a number's level depends on its own code and on those before it in its row.

Trellis-coded quantisation (Marcellin and Fischer 1990, https://doi.org/10.1109/26.46532) is a vector quantiser for
whole rows that is read number by number. A row may use twice as many levels as its codes could tell apart: a shift
register of the last bits says which half of them each number may take, and the best path through the levels of a row is
searched for (Viterbi's algorithm). For normal numbers 2 bits then leave 0.088 of the variance; the best levels for
single numbers leave 0.1175, and no code at all can leave less than 0.0625.

The sets of levels and the register are Ungerboeck's codes for amplitude modulation (1982,
https://doi.org/10.1109/TIT.1982.1056454, table I). A row's scale and offset are those of least squares for the path.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from kvquant.plugin import BackendSpec, Capabilities, QuantizedRows, Scheme, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

#: States of the register -> which of its bits are summed for the high and the low bit of the set (Ungerboeck's parity
#: checks h0 and h1, in octal).
TAPS = {4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 64: (0o103, 0o24)}
_STATES = 8
#: Bits and states -> levels above zero, as ``python -m tests.benchmarks.trellis_levels`` finds them.
_LEVELS = {
    (1, 4): (0.3974, 1.1815),
    (1, 8): (0.3712, 1.1848),
    (1, 16): (0.3631, 1.1888),
    (1, 64): (0.3208, 1.207),
    (2, 4): (0.1754, 0.6348, 1.0706, 1.8633),
    (2, 8): (0.1956, 0.6055, 1.0817, 1.8615),
    (2, 16): (0.1914, 0.6016, 1.0786, 1.8649),
    (2, 64): (0.1745, 0.5996, 1.0697, 1.8695),
    (3, 4): (0.0853, 0.3059, 0.494, 0.7355, 0.9784, 1.2906, 1.718, 2.4135),
    (3, 8): (0.1026, 0.2822, 0.5014, 0.7143, 0.9755, 1.2845, 1.7268, 2.4201),
    (3, 16): (0.0979, 0.2847, 0.4951, 0.7109, 0.9691, 1.2812, 1.7262, 2.4206),
    (3, 64): (0.0814, 0.2935, 0.4759, 0.7094, 0.9531, 1.28, 1.729, 2.4278),
}
#: Numbers that are searched at once: what is made of them along the way stays in a processor's cache.
_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class TrellisQuantizer:
    """Searches the best path for each row. Keeps nothing between calls.

    Attributes:
        scheme: 1 to 3 bits, axis, group size and the options ``states`` and ``offset``.
    """

    scheme: Scheme

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: ``states`` or ``offset`` has a value that is not among those listed.
        """
        if type(self._states) is not int or self._states not in TAPS:
            raise ValueError(f"states={self._states!r} cannot work: expected one of {', '.join(map(str, TAPS))}")
        if self._offset not in ("auto", True, False):
            raise ValueError(f"offset={self._offset!r} cannot work: expected 'auto', True or False")

    @property
    def _states(self) -> Any:
        return self.scheme.options.get("states", _STATES)

    @property
    def _offset(self) -> object:
        return self.scheme.options.get("offset", "auto")

    @property
    def has_offset(self) -> bool:
        """Whether rows have an offset: a channel's numbers lie around a mean, those of a token around none."""
        return self.scheme.axis == "channel" if self._offset == "auto" else bool(self._offset)

    def quantize(self, rows: Tensor) -> QuantizedRows:
        """Quantise each row; a constant one gets scale 0, and comes back exactly where rows have an offset.

        Args:
            rows: floating ``[n_groups, group_size]``, finite; not modified.

        Returns:
            codes uint8 ``[n_groups, group_size]``; scale and offset ``[n_groups]``, float64 for float64 rows and
            float32 for all others; table float32 ``[2**(nbits + 1)]``; taps.
        """
        import torch

        states, nbits = self._states, self.scheme.nbits
        table = torch.tensor(levels(nbits, states), dtype=torch.float32, device=rows.device)
        wide = torch.promote_types(rows.dtype, torch.float32)
        # Relative to the largest magnitude, so that no square overflows or vanishes; in float64, so that the order of a
        # sum does not show in what is rounded.
        size = rows.abs().amax(dim=1, keepdim=True).double()
        unit = rows.double() / torch.where(size > 0, size, 1)
        mean = unit.mean(dim=1, keepdim=True) if self.has_offset else torch.zeros_like(size)
        deviation = (unit - mean).square().mean(dim=1, keepdim=True).sqrt()
        # What is left of a constant row is rounding.
        varies = deviation > torch.finfo(wide).eps * mean.abs()
        normal = ((unit - mean) / torch.where(varies, deviation, 1)).float()

        step = max(1, _AT_ONCE // rows.shape[1]) if rows.device.type == "cpu" else max(1, len(rows))
        codes, indices = zip(*(search(part, table, TAPS[states]) for part in normal.split(step)), strict=True)
        level = table.double()[torch.cat(indices).long()]
        middle = level.mean(dim=1, keepdim=True) if self.has_offset else torch.zeros_like(size)
        level -= middle
        # Least squares: the regression of the row on its levels.
        spread = level.square().sum(dim=1, keepdim=True)
        scale = (level * (unit - mean)).sum(dim=1, keepdim=True) / torch.where(spread > 0, spread, 1)
        scale = torch.where(varies & (scale > 0), scale, 0)
        offset = (mean - scale * middle) * size
        limit = torch.finfo(wide).max / 4  # levels reach to less than 4 scales
        return QuantizedRows(
            codes=torch.cat(codes),
            scale=(scale * size).clamp(max=limit).to(wide).squeeze(1),
            offset=offset.clamp(-limit, limit).to(wide).squeeze(1) if self.has_offset else None,
            table=table,
            taps=TAPS[states],
        )


def search(rows: Tensor, table: Tensor, taps: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the path of each row with the smallest squared error (Viterbi 1967).

    Args:
        rows: float32 ``[n, group_size]``, of about unit size.
        table: float32, the levels in rising order.
        taps: of the register, which begins with zeros.

    Returns:
        The codes and the indices into the table, uint8 ``[n, group_size]``.
    """
    import torch

    sets, states = _sets(taps), len(_sets(taps))
    numbers = rows.T.contiguous()  # [group_size, n]: a step works on whole rows of memory
    members = table.view(-1, 4).T.contiguous()  # [4, levels of a set], rising
    # Of each set, only the level that is nearest can be on the best path.
    nearest = torch.zeros((len(numbers), 4, len(rows)), dtype=torch.uint8, device=rows.device)
    for border in ((members[:, 1:] + members[:, :-1]) / 2).unbind(1):
        nearest += numbers[:, None] > border[:, None]
    chosen = members.gather(1, nearest.transpose(0, 1).reshape(4, -1).long()).view(4, *numbers.shape)
    errors = (chosen - numbers).square_().transpose(0, 1)

    # A state is the last bits. A number's state and its predecessor's differ in the bit that falls out, which is the
    # choice between two predecessors, and in the one that comes in.
    set_of = torch.tensor(sets, device=rows.device).T.flatten()  # [2 * states]: those of one choice, then of the other
    cost = torch.full((states, len(rows)), torch.inf, dtype=torch.float32, device=rows.device)
    cost[0] = 0
    choices = torch.empty((len(numbers), states, len(rows)), dtype=torch.bool, device=rows.device)
    for at in range(len(numbers)):
        both = errors[at].index_select(0, set_of).view(2, states // 2, 2, -1)
        first, second = both.add_(cost.view(2, states // 2, 1, -1)).view(2, states, -1)
        torch.lt(second, first, out=choices[at])
        torch.minimum(first, second, out=cost)

    path, picked = torch.empty_like(numbers, dtype=torch.int64), torch.empty_like(numbers, dtype=torch.bool)
    state = cost.argmin(dim=0)
    for at in range(len(numbers) - 1, -1, -1):
        path[at] = state
        torch.gather(choices[at], 0, state[None], out=picked[at : at + 1])
        state = (state >> 1).add_(picked[at], alpha=states // 2)
    number = set_of[path + states * picked]
    member = nearest.gather(1, number[:, None]).squeeze(1)
    codes = (member << 1) + (path & 1).to(torch.uint8)
    return codes.T, ((member << 2) + number.to(torch.uint8)).T


@cache
def _sets(taps: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return, for each state, the set of levels when the bit that falls out is 0 and when it is 1."""
    states = 1 << max(taps).bit_length() - 1

    def number(register: int) -> int:
        high, low = ((register & tap).bit_count() % 2 for tap in taps)
        return 2 * high + low

    return tuple((number(state), number(state + states)) for state in range(states))


def levels(nbits: int, states: int) -> tuple[float, ...]:
    """Return the levels for unit normal numbers, in rising order."""
    above = _LEVELS[nbits, states]
    return (*(-level for level in reversed(above)), *above)


@hookimpl
def kvquant_register_backends() -> list[BackendSpec]:
    """Declare the backend; imports no torch."""
    return [
        BackendSpec(
            name="trellis",
            factory="kvquant_plugins.trellis:TrellisQuantizer",
            capabilities=Capabilities(
                nbits=(1, 2, 3),
                dtypes=("float32", "float16", "bfloat16", "float64"),
                formats=("trellis",),
                options={
                    "states": f"of the register: {', '.join(map(str, TAPS))} (default {_STATES}); more search longer",
                    "offset": "whether rows have an offset: True, False or auto (on the channel axis; the default)",
                },
            ),
            summary="Trellis-coded quantisation: the best path of levels for a whole group; needs nothing installed",
            url="https://doi.org/10.1109/26.46532",
        )
    ]

"""The best assignment of widths under a budget, by integer programming.

With ``x[s, w]`` 1 where stream ``s`` gets width ``w`` and else 0, ``n[s]`` the share of the numbers that are in it,
``b[s, w]`` the bits that an element of it takes and ``d[s, w]`` the KL divergence that this adds::

    minimise    sum d[s, w] x[s, w]
    subject to  sum_w x[s, w] = 1 for every s      and      sum n[s] b[s, w] x[s, w] <= budget

It is the multiple-choice knapsack problem; HiGHS solves it (`scipy.optimize.milp`). That the divergences of streams
add up is an assumption, see `kvquant.evaluation.tuning.tune`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvquant.evaluation.intervals import FloatArray

#: What a sum of bits may exceed a budget by: the rounding of the sum.
ROUNDING = 1e-9
#: What the largest divergence is scaled to: the solver stops within 1e-6 of the best, and takes 1e-6 for nothing.
_SCALE = 1e4


@dataclass(frozen=True)
class Solution:
    """An assignment.

    Attributes:
        choice: for each stream, the number of its width.
        bits: bits per element, the mean over all numbers.
        added: the sum of what the widths add to KL divergence, in nats.
    """

    choice: tuple[int, ...]
    bits: float
    added: float


@dataclass(frozen=True)
class Costs:
    """What each width of each stream costs.

    Attributes:
        shares: ``[streams]``, the share of the numbers that are in each; they sum up to 1.
        bits: ``[streams, widths]``, bits per element of the stream.
        added: ``[streams, widths]``, what it adds to KL divergence, in nats.
    """

    shares: FloatArray
    bits: FloatArray
    added: FloatArray

    def solution(self, choice: tuple[int, ...]) -> Solution:
        """Return the sums for a choice of widths."""
        at = np.arange(len(choice)), np.asarray(choice)
        return Solution(choice, float(self.shares @ self.bits[at]), float(self.added[at].sum()))


def mean_bits(shares: FloatArray, bits: FloatArray) -> tuple[float, float]:
    """Return the fewest and the most bits per element that an assignment can have; see `Costs`."""
    return float(shares @ bits.min(1)), float(shares @ bits.max(1))


def solve(costs: Costs, budget: float) -> Solution:
    """Return the assignment that adds least to KL divergence within a budget.

    Args:
        costs: of all choices.
        budget: bits per element at most, at least the fewest of `mean_bits`.

    Raises:
        ValueError: no assignment is within the budget.
    """
    from scipy.optimize import LinearConstraint, milp

    streams, widths = costs.bits.shape
    largest = float(np.abs(costs.added).max()) or 1.0
    one_each = np.kron(np.eye(streams), np.ones(widths))
    spent = (costs.shares[:, None] * costs.bits).ravel()
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(spent[None], ub=budget + ROUNDING)]
    while True:
        found = milp(
            costs.added.ravel() * (_SCALE / largest),
            integrality=np.ones(streams * widths),
            bounds=(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        if found.x is None:
            raise ValueError(f"no assignment has {budget} bits per element or fewer: {found.message}")
        taken = found.x.reshape(streams, widths)
        solution = costs.solution(tuple(taken.argmax(1).tolist()))
        if solution.bits <= budget + ROUNDING:
            return solution
        # The solver takes 1e-6 for nothing, and a budget is a promise: the same again without this assignment.
        chosen = np.zeros((streams, widths))
        chosen[np.arange(streams), solution.choice] = 1
        constraints.append(LinearConstraint(chosen.reshape(1, -1), ub=streams - 1))


def trade_off(costs: Costs, points: int = 33) -> list[Solution]:
    """Return the best assignments under budgets from the fewest bits to the most, each once."""
    low, high = mean_bits(costs.shares, costs.bits)
    found: dict[tuple[int, ...], Solution] = {}
    for budget in np.linspace(low, high, points):
        solution = solve(costs, float(budget))
        found.setdefault(solution.choice, solution)
    return list(found.values())

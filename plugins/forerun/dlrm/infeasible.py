"""No plan fits: which table, which tier, how much is missing, and what would be enough."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from forerun.dlrm.budget import Budget
from forerun.dlrm.options import summarise
from forerun.dlrm.packing import pack
from forerun.dlrm.placement import Placement
from forerun.dlrm.problem import Problem

__all__ = ["Infeasible", "diagnose"]


class Infeasible(Exception):
    """No plan was found that keeps to the memory of the ranks.

    Args:
        table: A table that does not fit.
        tier: The tier of memory that lacks bytes (index M).
        missing: Bytes that are missing there: in all if the tables together are too large, else on one rank.
        enough: Bytes that, added to this tier of each rank, were seen to be enough; None: no such number was found.
        proven: Whether no plan exists, or the search only found none.
        hurried: Whether the time ended before it was known what is enough, or the least that is.
    """

    def __init__(
        self, table: int, tier: int, missing: int, enough: int | None, proven: bool, hurried: bool, reason: str
    ) -> None:
        self.table, self.tier, self.missing, self.enough, self.proven = table, tier, missing, enough, proven
        self.hurried = hurried
        cure = "" if enough is None else f"; {enough} bytes more on each rank would be enough"
        super().__init__(f"{reason}: {missing} bytes of tier {tier} are missing{cure}")


def diagnose(problem: Problem, table: int, *, proven: bool = False, deadline: float | None = None) -> Infeasible:
    """The exception to raise for a problem (without groups) for which no plan was found.

    Args:
        problem: What was planned.
        table: The table that found no place in the attempt that came furthest.
        proven: Whether it is known already that no plan exists.
        deadline: Moment of `time.monotonic()` (s) after which it is not asked any more what would be enough.
    """
    budget = Budget(np.inf, deadline)
    options = summarise(problem)
    no_place = np.isinf(np.minimum.reduceat(options.peak, problem.option_start[:-1]))
    if no_place.any():
        table = int(np.argmax(no_place))
        own = slice(*problem.option_start[[table, table + 1]].tolist())
        over = options.shard_memory[own] - problem.capacity.max(0)  # [options, M]
        easiest = int(np.argmin(np.clip(over, 0, None).sum(1)))
        tier = int(np.argmax(over[easiest]))
        missing = max(int(over[easiest, tier]), 1)
        reason = f"table {table}: no option's shards fit on the ranks that it asks for, even empty ones"
        return Infeasible(table, tier, missing, _enough(problem, tier, missing, budget), True, budget.out, reason)
    least = np.minimum.reduceat(options.memory, problem.option_start[:-1], axis=0)
    over = least.sum(0) - problem.capacity.sum(0)
    if (over > 0).any():
        tier = int(np.argmax(over))
        table = int(np.argmax(least[:, tier]))
        missing = int(over[tier])
        enough = _enough(problem, tier, -(-missing // problem.ranks), budget)
        reason = f"all tables together, each in its smallest option (table {table} is the largest), exceed the ranks"
        return Infeasible(table, tier, missing, enough, True, budget.out, reason)
    # Together they would fit: it is the packing, or two tiers at once. Ask each tier what would be enough.
    answers = [(_enough(problem, tier, 1, budget), tier) for tier in range(problem.capacity.shape[1])]
    enough, tier = min(answers, key=lambda answer: (answer[0] is None, answer[0] or 0))
    missing = enough if enough is not None else max(int(least[table].max()), 1)
    reason = f"table {table} finds no rank with memory for it"
    return Infeasible(table, tier, missing, enough, proven, budget.out, reason)


def _enough(problem: Problem, tier: int, start: int, budget: Budget) -> int | None:
    """About the fewest bytes that each rank's tier lacks (within a hundredth, if the budget lasts); None: no number
    helps, or the budget ended before one was found."""
    options = summarise(problem)
    price = np.zeros(problem.capacity.shape[1])
    price[tier] = problem.cost.sum() + 1.0  # memory of this tier above all

    def fits(more: int) -> bool:
        capacity = problem.capacity.copy()
        capacity[:, tier] += more
        larger = replace(problem, capacity=capacity)
        admitted = summarise(larger)
        return any(
            pack(Placement(larger), admitted, price, np.inf, by_memory=1e9, budget=budget) is None
            for price in (price, dear)
        )

    # All tiers dear too: another tier may be short at the same time.
    dear = np.full(len(price), price[tier])
    low, high = start - 1, start
    limit = int(options.memory[:, tier].sum()) + start
    while budget.out or not fits(high):
        if budget.out or high > limit:
            return None
        low, high = high, 2 * high
    while high - low > max(1, high // 100) and not budget.out:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high

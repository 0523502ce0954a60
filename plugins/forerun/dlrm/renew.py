"""Takes a few tables off, puts them anew, keeps what is no worse: again and again until the work is spent.

Source: Shaw, Using Constraint Programming and Local Search Methods to Solve Vehicle Routing Problems, 1998.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forerun.dlrm.budget import Budget
from forerun.dlrm.local_search import descend
from forerun.dlrm.options import Options
from forerun.dlrm.packing import insert
from forerun.dlrm.placement import Placement
from forerun.dlrm.problem import Plan, Problem

__all__ = ["renew"]

_POWER = 8  # of the loads, summed: falls with the rating, and where several ranks share it
_SLACK = 0.002  # by what share of the rating a turn may end worse, on average
_MOST = 40  # tables that are taken off at once at most
_PATIENCE = 60  # turns without a better plan after which the best one is taken up again


def renew(
    plan: Plan,
    options: Options,
    price: NDArray[np.float64],
    enough: float,
    random: np.random.Generator,
    budget: Budget,
    problem: Problem,
) -> Plan:
    """The plan or a better one.

    Args:
        plan: Of a problem without groups.
        options: Of the problem.
        price: `[M]` ms per byte when options are compared.
        enough: The rating (ms) at which to stop.
        random: Chooses the tables, their order and how their options are compared.
        budget: When to stop.
        problem: What is planned.
    """
    placement = Placement(problem)
    placement.copy_from(plan)
    best, weight = plan, options.total + options.memory @ price
    weight[~np.isfinite(options.peak)] = np.inf
    turns_since_best = 0
    while not budget.out and best.rating > enough:
        turns_since_best += 1
        if turns_since_best % _PATIENCE == 0:
            placement.copy_from(best)
        rating = placement.rating
        before = float(((placement.load / rating) ** _POWER).sum())
        load, free = placement.load.copy(), placement.free.copy()
        option, ranks = placement.option.copy(), list(placement.ranks)
        tables = _some(placement, random)
        budget.spend(300 + 0.5 * problem.tables)
        for table in tables:
            placement.take(table)
        noise = np.exp(random.normal(0, random.choice([0.05, 0.3, 1.0]), len(weight)))
        lists = _ranked(problem, weight * noise, tables)
        limit = min(rating, best.rating) * float(random.choice([1.0, 0.98, 0.9]))
        size = {f: options.shard_cost[lists[f][0]] * float(random.uniform(0.5, 1.0)) for f in tables}
        order = sorted(tables, key=lambda f: -size[f])
        fits = _put(placement, order, lists, limit, budget, bool(random.integers(2)))
        if fits and placement.rating < rating * 1.2:
            descend(placement, options, budget)
        if fits and placement.rating < best.rating * (1 - 1e-9):
            best, turns_since_best = placement.plan(), 0
            continue
        slack = 1.0 + float(random.exponential(_SLACK))
        if fits and float(((placement.load / rating) ** _POWER).sum()) <= before * slack**_POWER:
            continue
        changed = np.flatnonzero([a is not b for a, b in zip(placement.ranks, ranks, strict=True)])
        for table in sorted({*tables, *changed.tolist()}):
            if placement.option[table] >= 0:
                placement.take(table)
        for table in np.flatnonzero(placement.option < 0).tolist():
            placement.put(table, int(option[table]), ranks[table])
        placement.load[:], placement.free[:] = load, free
    return best


def _ranked(problem: Problem, weight: NDArray[np.float64], tables: list[int]) -> list[list[int]]:
    """As `packing.ranked`, for these tables only (the others' lists are empty)."""
    lists: list[list[int]] = [[] for _ in range(problem.tables)]
    for table in tables:
        own = np.arange(problem.option_start[table], problem.option_start[table + 1])
        own = own[np.isfinite(weight[own])]
        lists[table] = own[np.argsort(weight[own], kind="stable")].tolist()
    return lists


def _some(placement: Placement, random: np.random.Generator) -> list[int]:
    """Tables of the fullest rank and of a few others, whole host groups."""
    problem = placement.problem
    full = int(placement.load.argmax())
    wanted = int(np.exp(random.uniform(np.log(2), np.log(min(problem.tables, _MOST) + 1))))
    tables: set[int] = set()
    for rank in [full, *random.permutation(problem.ranks)[:wanted].tolist()]:
        on_rank = placement.tables_on(rank)
        if len(on_rank):
            count = min(len(on_rank), int(random.integers(1, 5)))
            tables |= set(random.choice(on_rank, size=count, replace=False).tolist())
        if len(tables) >= wanted:
            break
    for table in sorted(tables):
        if (group := problem.host_group[table]) >= 0:
            tables |= set(np.flatnonzero(problem.host_group == group).tolist())
    return sorted(tables)


def _put(
    placement: Placement, tables: list[int], lists: list[list[int]], limit: float, budget: Budget, snug: bool
) -> bool:
    done: set[int] = set()
    for table in tables:
        if table in done:
            continue
        group = placement.problem.host_group[table]
        together = [table] if group < 0 else [f for f in tables if placement.problem.host_group[f] == group]
        done.update(together)
        if insert(placement, together, lists, limit, budget, snug=snug) is not None:
            return False
    return True

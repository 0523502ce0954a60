"""A first plan for a rating: the cheapest options that it admits, the largest tables first, each on the emptiest rank.

Source: longest processing time first: Graham 1969; a rating that is given, and asked whether it can be kept: Hochbaum &
Shmoys, Using Dual Approximation Algorithms for Scheduling Problems, 1987.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forerun.dlrm.budget import Budget
from forerun.dlrm.options import Options, first_per_table
from forerun.dlrm.placement import Placement
from forerun.dlrm.problem import Problem, Spread

__all__ = ["Misfit", "insert", "pack", "ranked"]


class Misfit(NamedTuple):
    """Why not all tables were put."""

    table: int  # whose memory fits nowhere any more; -1: a load reached what was not worth going on for


def ranked(problem: Problem, weight: NDArray[np.float64]) -> list[list[int]]:
    """Per table, its options by rising weight; those of infinite weight are left out."""
    order = np.lexsort((weight, problem.table))
    order = order[np.isfinite(weight[order])]
    cuts = np.searchsorted(problem.table[order], np.arange(1, problem.tables))
    return [part.tolist() for part in np.split(order, cuts)]


def pack(
    placement: Placement,
    options: Options,
    price: NDArray[np.float64],
    limit: float,
    *,
    by_memory: float = 0.0,
    snug: bool = False,
    budget: Budget,
    give_up: float = np.inf,
) -> Misfit | None:
    """Puts every table, with the ranks below the limit where that can be.

    Args:
        placement: Empty ranks.
        options: Of its problem.
        price: `[M]` ms per byte, added to an option's cost when options are compared.
        limit: The rating to keep (ms).
        by_memory: How much a table's share of a rank's memory counts beside its share of the limit in the order.
        snug: Whether the fullest rank that keeps the limit is taken, not the emptiest.
        budget: What the work is counted on.
        give_up: Stops, the plan unfinished, once a load must reach this (ms).

    Returns:
        The table that stopped it, if not all are put.
    """
    problem = placement.problem
    weight = options.total + options.memory @ price
    weight[~np.isfinite(options.peak)] = np.inf
    lists = ranked(problem, weight)
    admitted = np.where(options.peak <= limit * (1 + 1e-9), weight, np.inf)
    first = first_per_table(problem, admitted)
    lonely = np.array([not options_ for options_ in lists])
    if lonely.any():
        return Misfit(int(np.argmax(lonely)))
    size = options.shard_cost[first] / max(limit, 1e-300)
    if by_memory:
        most = np.maximum(problem.capacity.max(0), 1)
        size = size + by_memory * (options.shard_memory[first] / most).max(1)
    # What has no choice of ranks goes first, then what needs a whole host.
    rank_bound = np.select([problem.spread[first] == s for s in (Spread.ALL, Spread.HOSTS, Spread.HOST)], [0, 1, 2], 3)
    grouped = problem.host_group >= 0
    order = np.lexsort((-size, rank_bound, ~grouped))
    done: set[int] = set()
    for table in order.tolist():
        if table in done:
            continue
        group = int(problem.host_group[table])
        tables = [table]
        if group >= 0:
            tables = [f for f in order[grouped[order]].tolist() if problem.host_group[f] == group]
        done.update(tables)
        misfit = insert(placement, tables, lists, limit, budget, snug=snug)
        if misfit is not None:
            return Misfit(misfit)
        if placement.rating >= give_up:
            return Misfit(-1)
    return None


def insert(
    placement: Placement,
    tables: Iterable[int],
    lists: list[list[int]],
    limit: float,
    budget: Budget,
    *,
    snug: bool = False,
) -> int | None:
    """Puts tables, one by one; of a host group all that are given, on the host that they load least.

    Returns:
        The first table that fits nowhere, or None.
    """
    tables = list(tables)
    problem = placement.problem
    group = int(problem.host_group[tables[0]])
    if group < 0 or len(tables) == 1 or placement.host_of(tables[0]) >= 0:
        for table in tables:
            if not _put_best(placement, lists[table], limit, -1, budget, snug):
                return table
        return None
    best: tuple[float, list[tuple[int, int, NDArray[np.int64]]]] | None = None
    misfit = tables[0]
    for host in range(len(problem.hosts)):
        put = []
        for table in tables:
            if not _put_best(placement, lists[table], limit, host, budget, snug):
                misfit = table
                break
            put.append(table)
        found = (placement.rating, [(table, *placement.take(table)) for table in reversed(put)])
        if len(put) == len(tables) and (best is None or found[0] < best[0]):
            best = found
    if best is None:
        return misfit
    for table, option, ranks in best[1]:
        placement.put(table, option, ranks)
    return None


def _put_best(placement: Placement, choices: list[int], limit: float, host: int, budget: Budget, snug: bool) -> bool:
    """The first option that keeps the limit, else the one that breaks it least."""
    least, option, ranks = np.inf, -1, np.zeros(0, np.int64)
    for choice in choices:
        place = placement.find(choice, host, limit if snug else 0.0)
        budget.spend(20 + 12 * min(int(placement.problem.shards[choice]), 8))
        if place and place.peak < least:
            least, option, ranks = place.peak, choice, place.ranks
            if least <= limit:
                break
    if option < 0:
        return False
    placement.put(int(placement.problem.table[option]), option, ranks)
    return True

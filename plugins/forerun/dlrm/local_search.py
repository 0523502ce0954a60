"""Lowers the largest load step by step: move a shard, swap two, shard a table otherwise.

Each step takes cost off the fullest rank and leaves every rank that it touches below what that rank had, so the loads,
sorted from the top, fall in lexicographic order: no step can be undone by another, and the search ends.

Source: Finn & Horowitz, A Linear Time Approximation Algorithm for Multiprocessor Scheduling, 1979 (moves off the
fullest machine).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forerun.dlrm.budget import Budget
from forerun.dlrm.options import Options
from forerun.dlrm.placement import Placement

__all__ = ["descend"]

_LEAST = 1e-9  # of the rating: a smaller gain is rounding
_TRIED = 48  # other options that one step tries at most


def descend(placement: Placement, options: Options, budget: Budget) -> None:
    """Steps until none is left or the budget is out."""
    while not budget.out and (_shift(placement, budget) or _reshard(placement, options, budget)):
        pass


def _shift(placement: Placement, budget: Budget) -> bool:
    """The best move or swap of a shard on the fullest rank, if one helps."""
    load, free, where = placement.load, placement.free, placement.slot_rank
    full = int(load.argmax())
    mine = np.flatnonzero(where == full)
    budget.spend(60 + 0.02 * len(where))
    if not len(mine):
        return False
    top = float(load[full]) * (1 - _LEAST)
    cost, memory, tied = placement.slot_cost, placement.slot_memory, placement.slot_tied
    host = placement.problem.host_index
    budget.spend(0.01 * len(mine) * len(load))

    after = np.maximum(load + cost[mine, None], load[full] - cost[mine, None])  # [K, R]
    after[(after >= top) | (tied[mine, None] & (host != host[full]))] = np.inf
    after[:, full] = np.inf
    k, r = np.nonzero(np.isfinite(after))
    fits = (free[r] >= memory[mine[k]]).all(1)
    best, move, swap = top, (-1, -1), (-1, -1)
    if fits.any():
        values = after[k[fits], r[fits]]
        at = int(values.argmin())
        best, move = float(values[at]), (int(mine[k[fits][at]]), int(r[fits][at]))

    others = np.flatnonzero((where >= 0) & (where != full))
    budget.spend(0.01 * len(mine) * len(others))
    less = cost[mine, None] - cost[others]  # [K, N]: what the full rank loses
    after = np.maximum(load[where[others]] + less, load[full] - less)
    k, n = np.nonzero((after < best) & (less > 0))
    if len(k):
        one, other = mine[k], others[n]
        more = memory[one] - memory[other]
        fits = (free[where[other]] >= more).all(1) & (free[full] >= -more).all(1)
        fits &= (host[where[other]] == host[full]) | ~(tied[one] | tied[other])
        fits &= placement.slot_table[one] != placement.slot_table[other]
        if fits.any():
            values = after[k, n][fits]
            at = int(values.argmin())
            best, swap = float(values[at]), (int(one[fits][at]), int(other[fits][at]))
    if swap[0] >= 0:
        there = int(where[swap[1]])
        _relocate(placement, swap[1], full)
        _relocate(placement, swap[0], there)
    elif move[0] >= 0:
        _relocate(placement, *move)
    return best < top


def _relocate(placement: Placement, slot: int, rank: int) -> None:
    table, shard = int(placement.slot_table[slot]), int(placement.slot_shard[slot])
    option, ranks = placement.take(table)
    ranks = ranks.copy()
    ranks[shard] = rank
    placement.put(table, option, ranks)


def _reshard(placement: Placement, options: Options, budget: Budget) -> bool:
    """The first other option (or other place) found that helps, of a table that loads the fullest rank."""
    problem, load = placement.problem, placement.load
    full = int(load.argmax())
    top = float(load[full]) * (1 - _LEAST)
    here = placement.tables_on(full)
    budget.spend(100 + 0.5 * problem.tables)
    if not len(here):
        return False
    tried: list[NDArray[np.int64]] = [np.arange(*problem.option_start[[f, f + 1]]) for f in here.tolist()]
    candidates = np.concatenate(tried)
    current = placement.option[problem.table[candidates]]
    gain = options.total[candidates] - options.total[current]
    room = problem.ranks * top - load.sum()
    allowed = (options.peak[candidates] < top) & (gain <= room)
    # A shard that lies alone was moved already, wherever that helps.
    allowed &= (candidates != current) | (problem.shards[candidates] > 1)
    candidates, gain = candidates[allowed], gain[allowed]
    for option in candidates[np.argsort(gain, kind="stable")][:_TRIED].tolist():
        table = int(problem.table[option])
        budget.spend(30 + 12 * min(int(problem.shards[option]), 8))
        undo = placement.take(table)
        place = placement.find(option)
        if place and max(place.peak, placement.load[undo[1]].max()) < top:
            placement.put(table, option, place.ranks)
            return True
        placement.put(table, *undo)
    return False

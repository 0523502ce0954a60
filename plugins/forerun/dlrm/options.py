"""What each option takes as a whole: its total cost, its memory, the rating that it forces alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forerun.dlrm.problem import Problem, Spread

__all__ = ["Options", "first_per_table", "summarise"]


class Options(NamedTuple):
    """Per option, summed or maximised over its shards."""

    total: NDArray[np.float64]  # [O] ms over all shards
    peak: NDArray[np.float64]  # [O] ms: no plan with the option rates less; inf: it fits on no empty ranks
    memory: NDArray[np.int64]  # [O, M] bytes over all shards
    shard_cost: NDArray[np.float64]  # [O] ms of its dearest shard
    shard_memory: NDArray[np.int64]  # [O, M] bytes of its largest shard


def summarise(problem: Problem) -> Options:
    """`Options` of the problem, `peak` with `base` and each rank's own capacity."""
    starts = problem.shard_start[:-1]
    return Options(
        np.add.reduceat(problem.cost, starts),
        _peaks(problem),
        np.add.reduceat(problem.memory, starts, axis=0),
        np.maximum.reduceat(problem.cost, starts),
        np.maximum.reduceat(problem.memory, starts, axis=0),
    )


def first_per_table(problem: Problem, weight: NDArray[np.float64]) -> NDArray[np.int64]:
    """`[F]` the option of least weight of each table, the earlier one of two alike."""
    order = np.lexsort((weight, problem.table))
    return np.asarray(order[problem.option_start[:-1]])


def _peaks(problem: Problem) -> NDArray[np.float64]:
    peak = np.zeros(len(problem.spread))
    count = problem.shards
    for spread in np.unique(problem.spread).tolist():
        for shards in np.unique(count[problem.spread == spread]).tolist():
            chosen = np.flatnonzero((problem.spread == spread) & (count == shards))
            index = problem.shard_start[chosen, None] + np.arange(shards)  # [K, shards]
            if spread == Spread.ALL:
                where = [np.arange(problem.ranks)]
            elif spread in (Spread.HOST, Spread.HOSTS):
                where = [ranks for ranks in problem.hosts if shards % len(ranks) == 0]
                if spread == Spread.HOST:
                    where = [ranks for ranks in where if shards == len(ranks)]
            else:
                peak[chosen] = _alone(problem, index.ravel()).reshape(index.shape).max(1)
                continue
            size = len(where[0])
            parts = index.reshape(len(chosen), -1, size)  # of a host each, or of all ranks
            best = np.full(parts.shape[:2], np.inf)
            for ranks in where:
                fits = (problem.memory[parts] <= problem.capacity[ranks]).all((-1, -2))
                rate = (problem.cost[parts] + problem.base[ranks]).max(-1)
                best = np.minimum(best, np.where(fits, rate, np.inf))
            peak[chosen] = best.max(1)
    return peak


def _alone(problem: Problem, shards: NDArray[np.int64]) -> NDArray[np.float64]:
    """The least rating of a rank that takes the shard and nothing else."""
    kinds, kind = np.unique(problem.capacity, axis=0, return_inverse=True)
    best = np.full(len(shards), np.inf)
    for number, capacity in enumerate(kinds):
        base = problem.base[kind.ravel() == number].min()
        fits = (problem.memory[shards] <= capacity).all(1)
        best[fits] = np.minimum(best[fits], base + problem.cost[shards][fits])
    return best

"""What a host can hold: the parts of tables' options that fit beside each other on its ranks.

The plans' set of hosts is taken apart: a *part* is a shard that lies on one rank, or the shards of an option that lie
on a host's ranks one each; a *pattern* is how many of each part one host holds. Parts are taken as small as they can
be (the least shard of those that lie together, every rank with the most memory that any has), so that each host of each
plan holds one of the patterns.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array

from forerun.dlrm import highs
from forerun.dlrm.problem import Problem, Spread

__all__ = ["Block", "Parts", "Pattern", "blocks_of", "parts_of", "richest"]

_LOOSE = 1e-9  # what a rank may hold over its share: a pattern too many proves less, one too few proves what is false


@dataclass(frozen=True)
class Block:
    """The ranks that a pattern is of: a host, or a rank where no option asks for hosts.

    Args:
        size: Ranks in it.
        count: How many there are.
        capacity: `[M]` bytes of each tier that a rank of it has at most.
    """

    size: int
    count: int
    capacity: NDArray[np.int64]


@dataclass(frozen=True)
class Parts:
    """The kinds of parts, Q in all, that options are made of.

    Args:
        option: `[Q]` the option that it is a part of.
        number: `[Q]` how many of them the option has.
        wide: `[Q]` whether it takes its cost and memory on every rank of a block, rather than on one.
        cost: `[Q]` ms on a rank.
        memory: `[Q, M]` bytes on a rank.
    """

    option: NDArray[np.int64]
    number: NDArray[np.int64]
    wide: NDArray[np.bool_]
    cost: NDArray[np.float64]
    memory: NDArray[np.int64]


@dataclass(frozen=True)
class Pattern:
    """One block's parts.

    Args:
        holds: `[Q]` how many of each kind.
        rating: ms of its fullest rank.
    """

    holds: NDArray[np.int64]
    rating: float


def blocks_of(problem: Problem, used: NDArray[np.bool_], most: int) -> Block | None:
    """What patterns of the options `used` `[O]` are of; None: hosts are unlike, or have more ranks than `most`."""
    hosted = np.isin(problem.spread[used], (Spread.HOST, Spread.HOSTS)).any()
    sizes = {len(ranks) for ranks in problem.hosts} if hosted else {1}
    size = max(sizes)
    if len(sizes) > 1 or size > most:
        return None
    return Block(size, problem.ranks // size, problem.capacity.max(0))


def parts_of(problem: Problem, used: NDArray[np.bool_], block: Block) -> Parts:
    """The parts of the options `used` `[O]`, but for those that lie on all ranks."""
    option: list[int] = []
    number: list[int] = []
    wide: list[bool] = []
    traits: list[NDArray[np.float64]] = []
    for taken in np.flatnonzero(used & (problem.spread != Spread.ALL)).tolist():
        shards = problem.of(taken)
        own = np.concatenate([problem.cost[shards, None], problem.memory[shards]], 1)
        together = problem.spread[taken] in (Spread.HOST, Spread.HOSTS)
        if together:
            own = own.reshape(-1, block.size, own.shape[1]).min(1)
        kinds, counts = np.unique(own, axis=0, return_counts=True)
        option += [taken] * len(kinds)
        number += counts.tolist()
        wide += [together] * len(kinds)
        traits += list(kinds)
    tiers = problem.memory.shape[1]
    trait = np.array(traits).reshape(-1, 1 + tiers)
    return Parts(
        np.array(option, np.int64),
        np.array(number, np.int64),
        np.array(wide, bool),
        trait[:, 0],
        trait[:, 1:].astype(np.int64),
    )


def richest(
    parts: Parts, table: NDArray[np.int64], block: Block, share: float, price: NDArray[np.float64]
) -> tuple[Pattern, float, int]:
    """The pattern that is worth most, by a small integer programme.

    Columns: per part on one rank and rank, per wide part, how many. Rows: each rank's cost and memory; of each table at
    most one option's worth of parts; ranks in falling order of cost, for they may change names.

    Args:
        parts: What patterns are of.
        table: `[Q]` the table of each part.
        block: What it is to fit on.
        share: ms that each rank may take.
        price: `[Q]` what a part is worth (>= 0).

    Returns:
        The pattern, what no pattern is worth more than, and the simplex iterations that it took.
    """
    worth = np.flatnonzero((price > 0) & (parts.cost <= share * (1 + _LOOSE)) & (parts.memory <= block.capacity).all(1))
    nothing = Pattern(np.zeros(len(price), np.int64), 0.0)
    if not len(worth):
        return nothing, 0.0, 0
    wide = parts.wide[worth]
    part = np.concatenate([worth[wide], np.repeat(worth[~wide], block.size)])
    rank = np.concatenate([np.full(int(wide.sum()), -1), np.tile(np.arange(block.size), int((~wide).sum()))])
    needs = np.column_stack([parts.cost / share, parts.memory / np.maximum(block.capacity, 1)])  # shares of a rank
    rows = []  # weights of each column, and the most that they may sum to
    for need in needs.T:
        if (need[worth] * parts.number[worth]).sum() > 1:
            rows += [(need[part] * ((rank == r) | (rank == -1)), 1 + _LOOSE) for r in range(block.size)]
    for r in range(block.size - 1):
        rows.append((needs[part, 0] * (1.0 * (rank == r + 1) - (rank == r)), 0.0))
    for t in np.unique(table[worth]).tolist():
        rows.append(((table[part] == t) / _all_of(parts)[part], 1.0))
    for q in worth[parts.number[worth] > 1].tolist():
        rows.append((1.0 * (part == q), float(parts.number[q])))
    scale = float(price.max())
    count, bound, work = _solve(price[part] / scale, parts.number[part], rows)
    holds = nothing.holds.copy()
    np.add.at(holds, part, count)
    cost = count * parts.cost[part]
    rating = max(float(cost[(rank == r) | (rank == -1)].sum()) for r in range(block.size))
    return Pattern(holds, rating), bound * scale * (1 + _LOOSE), work


def _solve(
    worth: NDArray[np.float64], most: NDArray[np.int64], rows: list[tuple[NDArray[np.float64], float]]
) -> tuple[NDArray[np.int64], float, int]:
    """Whole numbers `[C]`, 0 to `most`, of the largest worth; what none is worth more than; simplex iterations."""
    matrix = csc_array(np.array([weights for weights, _ in rows]))
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(worth), len(rows)
    lp.sense_ = highspy.ObjSense.kMaximize
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = worth, np.zeros(len(worth)), most.astype(float)
    lp.row_lower_, lp.row_upper_ = np.full(len(rows), -np.inf), np.array([high for _, high in rows])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    lp.integrality_ = [highspy.HighsVarType.kInteger] * len(worth)
    solver = highs.solver(mip_rel_gap=1e-6, primal_feasibility_tolerance=_LOOSE, mip_feasibility_tolerance=_LOOSE)
    solver.passModel(lp)
    solver.run()
    info = solver.getInfo()
    found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    count = np.round(np.array(solver.getSolution().col_value)) if found else np.zeros(len(worth))
    bound = float(info.mip_dual_bound) if np.isfinite(info.mip_dual_bound) else float("inf")
    return count.astype(np.int64), bound, max(int(info.simplex_iteration_count), 1)


def _all_of(parts: Parts) -> NDArray[np.float64]:
    """`[Q]` how many parts of any kind the part's option has."""
    _, inverse = np.unique(parts.option, return_inverse=True)
    return np.asarray(np.bincount(inverse, parts.number)[inverse], np.float64)

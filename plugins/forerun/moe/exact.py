"""The best placement of few experts, by looking at all.

Placements are rated without a limit on tokens first, which bounds their value with one; then, from the best on, with
the limit, as a transport problem that HiGHS solves exactly, until the next bound is no better.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import factorial

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array

from forerun.moe.task import Task

__all__ = ["best_of_all", "placements"]


def placements(experts: int, ranks: int) -> int:
    """How many placements there are, ranks being alike."""
    each = experts // ranks
    return int(factorial(experts) // (factorial(each) ** ranks * factorial(ranks)))


def best_of_all(task: Task) -> tuple[NDArray[np.int64], float] | None:
    """The best placement and its pairs saved, token ids split between ranks where that helps.

    Ranks must be alike: no host is nearer than another.

    Returns:
        `[E]` and the value; None if no placement keeps to the limit of the experts' load.
    """
    rows, table = _alike(task)
    rated: list[tuple[float, NDArray[np.int64]]] = []
    for groups in _partitions(tuple(range(task.experts)), task.experts // task.ranks):
        rank = np.empty(task.experts, np.int64)
        for number, group in enumerate(groups):
            rank[list(group)] = number
        if np.bincount(rank, task.load).max() <= task.expert_limit:
            rated.append((float(_gain(table, rank, task.ranks).max(0).sum()), rank))
    rated.sort(key=lambda entry: -entry[0])
    best: tuple[float, NDArray[np.int64]] | None = None
    for bound, rank in rated:
        if best is not None and bound <= best[0] * (1 + 1e-12):
            break
        value = _transported(_gain(table, rank, task.ranks), rows, task.token_limit)
        if best is None or value > best[0]:
            best = value, rank
    return None if best is None else (best[1], best[0])


def _partitions(experts: tuple[int, ...], each: int) -> Iterator[list[tuple[int, ...]]]:
    if not experts:
        yield []
        return
    first, *rest = experts
    for mates in combinations(rest, each - 1):
        left = tuple(expert for expert in rest if expert not in mates)
        for others in _partitions(left, each):
            yield [(first, *mates), *others]


def _alike(task: Task) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows of the same shares as one: occurrences `[n]`, counts `[n, E]`. Nothing is lost where ids can be split."""
    counts = task.counts[task.counts.any(1)].astype(np.float64)
    shares = counts
    if (counts == counts.round()).all():
        shares = counts / np.gcd.reduce(counts.astype(np.int64), axis=1)[:, None]
    _, kind = np.unique(shares, axis=0, return_inverse=True)
    table = np.zeros((kind.max() + 1, task.experts))
    np.add.at(table, kind.ravel(), counts)
    return np.asarray(table.sum(1) / task.top_k), table


def _gain(table: NDArray[np.float64], rank: NDArray[np.int64], ranks: int) -> NDArray[np.float64]:
    return np.asarray(np.eye(ranks)[rank].T @ table.T)


def _transported(gain: NDArray[np.float64], occurrences: NDArray[np.float64], limit: float) -> float:
    """The largest gain with each row's occurrences shared among ranks, none above the limit."""
    ranks, rows = gain.shape
    if np.bincount(gain.argmax(0), occurrences, ranks).max() <= limit:
        return float(gain.max(0).sum())
    columns = np.arange(ranks * rows)  # the share of row n on rank r: column r * rows + n
    weights = np.concatenate([np.tile(occurrences, ranks), np.ones(len(columns))])
    places = np.concatenate([columns // rows, ranks + columns % rows])
    matrix = csc_array((weights, (places, np.tile(columns, 2))), shape=(ranks + rows, len(columns)))
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(columns), ranks + rows
    lp.col_cost_ = gain.ravel()
    lp.col_lower_, lp.col_upper_ = np.zeros(len(columns)), np.ones(len(columns))
    lp.row_lower_ = np.concatenate([np.full(ranks, -np.inf), np.ones(rows)])
    lp.row_upper_ = np.concatenate([np.full(ranks, limit), np.ones(rows)])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    lp.sense_ = highspy.ObjSense.kMaximize
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.setOptionValue("output_flag", False)
    solver.passModel(lp)
    solver.run()
    assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return float(solver.getInfo().objective_function_value)

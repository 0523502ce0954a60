"""Experts grouped onto ranks so that tokens find theirs together: few experts exactly, many by a search.

1. The table is made smaller (`coarsen`).
2. From many random balanced placements, experts are exchanged for as long as it pays (`local_search`).
3. The best one is shaken, a few experts permuted, and exchanged again; what is better is kept.
4. The best few are rated on the whole table.

Source: Speculative MoE, arXiv 2503.04398 (balanced co-clustering, its balance term replaced by limits on both loads);
iterated local search: Lourenço, Martin & Stützle, 2003.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from forerun.moe.coarsen import coarsened
from forerun.moe.exact import best_of_all, placements
from forerun.moe.local_search import descend
from forerun.moe.task import Rating, Task

__all__ = ["Grouping", "contiguous", "default_effort", "group"]

_FEW = 500  # placements that are all looked at
_FINALISTS = 5


@dataclass(frozen=True, eq=False)
class Grouping:
    """One layer's experts on ranks.

    Args:
        rank: `[E]` the rank of each expert, E/R on each.
        rating: What it is worth on the table that it was made from.
        exact: Whether no placement is better on that table, token ids split between ranks where that helps.
        within_limits: Whether both loads keep to the task's limits.
    """

    rank: NDArray[np.int64]
    rating: Rating
    exact: bool
    within_limits: bool


def contiguous(experts: int, ranks: int) -> NDArray[np.int64]:
    """`[E]` the placement of stock expert parallelism: expert e on rank e // (E/R)."""
    return np.arange(experts) // (experts // ranks)


def default_effort(experts: int) -> int:
    """Descents that take about ten seconds of a core."""
    return int(np.clip(500_000 // experts**2, 16, 200))


def group(task: Task, *, effort: int | None = None, seed: int = 0, deadline: float | None = None) -> Grouping:
    """The best placement found; the same one for the same arguments unless a deadline cuts it short.

    Args:
        task: What is grouped.
        effort: Descents; None: `default_effort`.
        seed: Of starts and shakes.
        deadline: Moment of `time.monotonic()` (s) after which no descent is begun, but for the first.
    """
    alike = bool((task.nearness == np.eye(task.ranks)).all())
    if alike and placements(task.experts, task.ranks) <= _FEW:
        found = best_of_all(task)
        if found is not None:
            return _finished(task, [found[0]], exact=True)
    small = replace(task, counts=coarsened(task.counts))
    random = np.random.default_rng(seed)
    effort = default_effort(task.experts) if effort is None else max(1, effort)
    limit = max(task.expert_limit, _least(task, random))
    best: list[tuple[float, NDArray[np.int64]]] = []
    for turn in range(effort):
        if best and deadline is not None and time.monotonic() > deadline:
            break
        if turn < effort / 3 or not best:
            start = _balanced(task, random, limit)
        else:
            start = _shaken(task, best[0][1], random, limit)
        rank, value = descend(small, start, random, limit)
        if not best or value > best[-1][0] or len(best) < _FINALISTS:
            best = sorted([*best, (value, rank)], key=lambda entry: -entry[0])[:_FINALISTS]
    return _finished(task, [rank for _, rank in best], exact=False)


def _finished(task: Task, ranks: list[NDArray[np.int64]], *, exact: bool) -> Grouping:
    rated = [(task.rate(rank), rank) for rank in ranks]
    rating, rank = max(rated, key=lambda entry: entry[0].saved)
    within = rating.experts <= task.limits.experts * (1 + 1e-6) and rating.tokens <= task.limits.tokens * (1 + 1e-6)
    return Grouping(rank, rating, exact, within)


def _least(task: Task, random: np.random.Generator) -> float:
    """A load of the fullest rank that can be reached: that of the best of a few packings."""
    packed = [_packed(task, random, spread) for spread in (0.0, *(0.5,) * 20)]
    return float(min(np.bincount(rank, task.load, task.ranks).max() for rank in packed)) * (1 + 1e-9)


def _balanced(task: Task, random: np.random.Generator, limit: float) -> NDArray[np.int64]:
    """A random placement within the limit, or the packing nearest to it that was found."""
    tried = []
    for spread in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        rank = _packed(task, random, spread)
        load = np.bincount(rank, task.load, task.ranks).max()
        if load <= limit:
            return rank
        tried.append((load, rank))
    return min(tried, key=lambda entry: entry[0])[1]


def _packed(task: Task, random: np.random.Generator, spread: float) -> NDArray[np.int64]:
    """Experts from large to small, in about that order, each to the emptiest rank that has room."""
    rank = np.empty(task.experts, np.int64)
    load, room = np.zeros(task.ranks), np.full(task.ranks, task.experts // task.ranks)
    for expert in np.argsort(-task.load * random.uniform(1 - spread / 2, 1 + spread / 2, task.experts)):
        to = int(np.where(room > 0, load, np.inf).argmin())
        rank[expert] = to
        load[to] += task.load[expert]
        room[to] -= 1
    return rank


def _shaken(task: Task, rank: NDArray[np.int64], random: np.random.Generator, limit: float) -> NDArray[np.int64]:
    """A few experts in each other's places."""
    most = max(2, min(task.experts, 14))
    for _ in range(100):
        chosen = random.choice(task.experts, random.integers(min(4, most), most + 1), replace=False)
        shaken = rank.copy()
        shaken[chosen] = rank[random.permutation(chosen)]
        if np.bincount(shaken, task.load, task.ranks).max() <= limit:
            return shaken
    return rank.copy()

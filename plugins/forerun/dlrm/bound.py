"""A rating that no plan goes below.

A plan of rating T takes only options that rate at most T alone, and R ranks hold at most R * T. So T is at least the
smallest number with ::

    sum over tables of min(total[o] for o in options if peak[o] <= T) + sum(base) <= R * T

Memory tightens it: with a price >= 0 per byte of each tier, the same holds of `total[o] + price @ memory[o]` if the
right side gains `price @ capacity` (Lagrangian relaxation: what is over is paid, what is left is given back). Every
price gives a bound; the best prices come from a linear programme that grows by cuts.

Source: volume and largest-job bounds: Graham, Bounds on Multiprocessing Timing Anomalies, 1969; the relaxation of job
and shape together: Ludwig & Tiwari, Scheduling Malleable and Nonmalleable Parallel Tasks, 1994; prices: Geoffrion 1974;
cuts: Kelley 1960.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from forerun.dlrm.merge import merge
from forerun.dlrm.options import Options, first_per_table, summarise
from forerun.dlrm.problem import Problem

__all__ = ["Bound", "lower_bound", "priced_bound", "volume_bound", "without_groups"]


class Bound(NamedTuple):
    """A lower bound and the prices of memory that prove it."""

    rating: float  # ms; inf: some table fits nowhere
    price: NDArray[np.float64]  # [M] ms per byte


def lower_bound(problem: Problem) -> float:
    """A rating (ms) that no plan goes below: memory and co-location counted."""
    return priced_bound(problem).rating


def volume_bound(problem: Problem) -> float:
    """A rating (ms) that no plan goes below even if memory were endless (but that each shard must fit on its rank)."""
    problem = without_groups(problem)
    return _smallest(problem, summarise(problem), np.zeros(problem.capacity.shape[1]))


def priced_bound(problem: Problem, *, rounds: int = 8) -> Bound:
    """The best bound over the prices of memory.

    Args:
        problem: What is planned.
        rounds: At most so many times are the prices asked again at the rating that the last ones gave.
    """
    problem = without_groups(problem)
    options = summarise(problem)
    price = np.zeros(problem.capacity.shape[1])
    rating = _smallest(problem, options, price)
    for _ in range(rounds):
        if not np.isfinite(rating):
            break
        asked = _prices(problem, options, rating)
        better = _smallest(problem, options, asked)
        if better <= rating * (1 + 1e-9):
            break
        rating, price = better, asked
    return Bound(rating, price)


def without_groups(problem: Problem) -> Problem:
    """The problem with one table per group, or, where that is too large, as if no tables were together."""
    merged = merge(problem)
    return merged.problem if merged.complete else merged.loose


def _smallest(problem: Problem, options: Options, price: NDArray[np.float64]) -> float:
    """The smallest T that the inequality of the module's docstring allows, exactly: between two peaks it is linear."""
    weight = options.total + options.memory @ price
    over = problem.base.sum() - float(price @ problem.capacity.sum(0))
    order = np.lexsort((options.peak, problem.table))  # by table, each by rising peak
    peak, best = options.peak[order], weight[order]
    least = float(max(problem.base.max(), peak[problem.option_start[:-1]].max(initial=0.0)))
    if not np.isfinite(least):
        return float("inf")
    for first, end in zip(problem.option_start[:-1].tolist(), problem.option_start[1:].tolist(), strict=True):
        np.minimum.accumulate(best[first:end], out=best[first:end])
    fall = np.diff(best, prepend=best[:1])
    fall[problem.option_start[:-1]] = best[problem.option_start[:-1]]  # from nothing to a table's first option
    by_peak = np.argsort(peak, kind="stable")
    by_peak = by_peak[np.isfinite(peak[by_peak])]
    need = (np.cumsum(fall[by_peak]) + over) / problem.ranks  # what T must be at least once the option is admitted
    at = np.maximum(peak[by_peak], least)
    until = np.append(at[1:], np.inf)
    first_fit = int(np.argmax((need < until) & (until > at)))
    # A sum in another order may come out larger by rounding: stay below.
    return float(max(at[first_fit], need[first_fit] * (1 - 1e-12)))


def _prices(problem: Problem, options: Options, rating: float) -> NDArray[np.float64]:
    """The prices `[M]` that miss the inequality at this rating by most (0 where memory does not bind)."""
    room = problem.capacity.sum(0).astype(np.float64)
    # The programme's tolerances are absolute: costs are given as shares of what all ranks hold at this rating.
    all_ranks = rating * problem.ranks if rating > 0 else 1.0
    unit = np.divide(all_ranks, room, out=np.zeros_like(room), where=room > 0)
    admitted = options.peak <= rating * (1 + 1e-12)
    price = np.zeros_like(room)
    cuts: list[tuple[float, NDArray[np.float64]]] = []
    best, best_price = -np.inf, price
    for _ in range(40):
        weight = np.where(admitted, options.total + options.memory @ price, np.inf)
        chosen = first_per_table(problem, weight)
        over = options.memory[chosen].sum(0) - room
        value = float(options.total[chosen].sum() + price @ over)
        if value > best:
            best, best_price = value, price
        if not cuts and (over <= 0).all():
            break
        cuts.append((float(options.total[chosen].sum()) / all_ranks, over * unit / all_ranks))
        # The largest t with t <= total + price @ over for every cut, prices in units of a rating's worth.
        answer = linprog(
            np.append(np.zeros(len(room)), -1.0),
            A_ub=np.array([np.append(-gradient, 1.0) for _, gradient in cuts]),
            b_ub=np.array([total for total, _ in cuts]),
            bounds=[(0, 1e3)] * len(room) + [(None, None)],
        )
        if answer.x is None or answer.x[-1] * all_ranks <= best * (1 + 1e-6):
            break
        price = answer.x[:-1] * unit
    return np.asarray(best_price)

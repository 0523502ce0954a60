"""A tighter lower bound where few ranks make a host: no host's parts are split as a fraction of all hosts.

A plan of rating T puts `u` ms on every rank in common (row-wise, data-parallel) and at most `T - u` beside it. Let
`U(c)` be the least that must be in common if no rank takes more than `c` beside it, with hosts' patterns in any mixture
(`master.py`). `U` falls with `c`, and T is at least the least `c + U(c)`. Between `c' < c` that is at least
`c' + U(c)`: the range of c, from the rating of a known plan down, is walked in steps, each as long as still proves that
no plan is better than the known one, or as short as is worth it.
"""

from __future__ import annotations

import time

import numpy as np

from forerun.dlrm.bound import without_groups
from forerun.dlrm.master import Master
from forerun.dlrm.options import summarise
from forerun.dlrm.patterns import blocks_of, parts_of
from forerun.dlrm.problem import Problem, Spread

__all__ = ["pattern_bound"]

_STEPS = 50  # at most, from the rating down to the bound that is known
_ROUNDING = 1e-8  # of the rating
_RANKS = 4  # of a host at most


def pattern_bound(
    problem: Problem, rating: float, known: float, *, work: int = 30_000, deadline: float | None = None
) -> float:
    """A rating (ms) that no plan goes below, at least `known`.

    Args:
        problem: What is planned.
        rating: Of a plan of the problem (ms); nothing above it is proven.
        known: What is known already (ms): returned where hosts have more than four ranks or are unlike, and where the
            work or the time does not suffice for more.
        work: Simplex iterations at most: counted, so that the same input gives the same bound.
        deadline: Moment of `time.monotonic()` (s) at which to stop.
    """
    problem = without_groups(problem)
    options = summarise(problem)
    used = options.peak <= rating
    block = blocks_of(problem, used, _RANKS)
    if block is None or block.count == 1:
        return known
    everywhere = problem.spread == Spread.ALL
    least = np.minimum.reduceat(problem.cost, problem.shard_start[:-1])  # ms that each rank takes at least
    parts = parts_of(problem, used, block)
    if not len(parts.number):
        return known
    master = Master(parts, block, problem.table, used, np.where(everywhere, least, 0.0), rating)
    base = float(problem.base.min())
    step = (rating - known) / _STEPS
    proved = rating * (1 - _ROUNDING)  # a plan that rates less by no more counts as no better
    share = proved - base
    while share > 0:
        if master.work >= work or (deadline is not None and time.monotonic() >= deadline):
            return known
        common = base + master.least(share, rating - base, work, step / 4)
        after = min(proved - common, share - step)
        proved = min(proved, after + common)
        if proved <= known:
            return known
        share = after
    return max(known, proved)

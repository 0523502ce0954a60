"""A good plan in seconds: options and places chosen together, then improved.

1. The lower bound gives a first rating to ask for, and prices of memory (`bound`).
2. `packing` puts all tables at that price; where memory runs out, memory gets dearer until they fit.
3. Ratings between the bound and the best plan are asked for by halving.
4. `local_search` lowers the fullest rank until nothing helps.
5. Until the work is spent: a few tables are taken off, most from full ranks, and put anew, then 4 again; what is no
   worse is kept.

Source: threshold search: Hochbaum & Shmoys 1987; taking off and putting anew: Shaw, Using Constraint Programming and
Local Search Methods to Solve Vehicle Routing Problems, 1998.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forerun.dlrm.bound import priced_bound
from forerun.dlrm.budget import Budget
from forerun.dlrm.infeasible import diagnose
from forerun.dlrm.local_search import descend
from forerun.dlrm.merge import merge
from forerun.dlrm.options import Options, summarise
from forerun.dlrm.packing import pack
from forerun.dlrm.placement import Placement
from forerun.dlrm.problem import Plan, Problem
from forerun.dlrm.renew import renew

__all__ = ["search"]

_FEW = 128  # tables that are renewed from several starts
_CLOSE = 1e-8  # of the bound: a plan so close to it is not improved


def search(
    problem: Problem,
    *,
    seed: int = 0,
    work: float | None = None,
    deadline: float | None = None,
    start: Plan | None = None,
) -> Plan:
    """A plan that rates near the bound; the same one for the same arguments unless a deadline cuts it short.

    Args:
        problem: What is planned.
        seed: Of the random choices of step 5.
        work: Units of about a microsecond of one core; None: 3 million, from 1500 tables on 2000 per table. A first
            plan is finished whatever it takes.
        deadline: Moment of `time.monotonic()` (s) after which nothing more is tried; None: only `work` ends it.
        start: A plan to improve; the answer is never worse.

    Raises:
        Infeasible: No plan was found that keeps to the ranks' memory.
    """
    merged = merge(problem)
    small = merged.problem
    if work is None:
        work = max(3e6, 2e3 * small.tables)
    budget = Budget(work, deadline)
    options = summarise(small)
    least, price = priced_bound(small)
    best: Plan | None = merged.contract(start) if start is not None else None
    placement = Placement(small)
    best = _first(small, options, price, least, budget, best)
    enough = least * (1 + _CLOSE)
    low = least
    for _ in range(6):
        if budget.out or best.rating <= max(enough, low * 1.002):
            break
        asked = (low + best.rating) / 2
        for snug in (True, False):
            trial = Placement(small)
            misfit = pack(trial, options, price, asked, snug=snug, budget=budget, give_up=best.rating)
            if misfit is None and trial.rating < best.rating:
                best = trial.plan()
        if best.rating > asked:
            low = asked
    placement.copy_from(best)
    descend(placement, options, budget)
    if placement.rating < best.rating:
        best = placement.plan()
    if best.rating > enough:
        best = _renewed(small, options, price, enough, best, seed, budget)
    plan = merged.expand(best)
    return start if start is not None and start.rating <= plan.rating else plan


def _renewed(
    problem: Problem,
    options: Options,
    price: NDArray[np.float64],
    enough: float,
    start: Plan,
    seed: int,
    budget: Budget,
) -> Plan:
    """The plan renewed: few tables from several starts, as each may end in a corner; then on from the best."""
    best = start
    for turn, share in enumerate((0.2, 0.25, 0.33, 0.5, 1.0) if problem.tables <= _FEW else (1.0,)):
        if best.rating <= enough or budget.out:
            break
        part = Budget((budget.work - budget.spent) * share, budget.deadline)
        begin = best if share == 1.0 else start
        found = renew(begin, options, price, enough, np.random.default_rng((seed, turn)), part, problem)
        budget.spend(part.spent)
        if found.rating < best.rating:
            best = found
    return best


def _first(
    problem: Problem,
    options: Options,
    price: NDArray[np.float64],
    least: float,
    budget: Budget,
    best: Plan | None,
) -> Plan:
    """The best of the plans that are packed at the bound, memory as dear as it must be for them to fit."""
    table = 0
    if np.isfinite(least):
        capacity = problem.capacity.sum(0)
        unit = np.divide(least * problem.ranks, capacity, out=np.zeros(len(price)), where=capacity > 0)
        found = 0
        for dearer in (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1e6):
            if found == 2 or (best is not None and budget.out):
                break
            for by_memory in (0.0, 1.0, 1e3):
                trial = Placement(problem)
                limit = least if dearer < 1e6 else np.inf
                misfit = pack(trial, options, price + dearer * unit, limit, by_memory=by_memory, budget=budget)
                if misfit is not None:
                    table = misfit.table
                    continue
                found += 1
                if best is None or trial.rating < best.rating:
                    best = trial.plan()
                break
    if best is None:
        raise diagnose(problem, table, deadline=budget.deadline)
    return best

"""The best plan, or the best that a deadline allows with a proof of how far it may be from it.

Solved by HiGHS as an integer programme (Huangfu & Hall, Parallelizing the Dual Revised Simplex Method, 2018). For few
tables: the columns are tables x options x ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array

from forerun.dlrm import highs
from forerun.dlrm.bound import lower_bound
from forerun.dlrm.infeasible import diagnose
from forerun.dlrm.merge import merge
from forerun.dlrm.options import summarise
from forerun.dlrm.problem import Plan, Problem, Spread, loads, make_plan
from forerun.dlrm.programme import Programme, build

__all__ = ["Solved", "columns", "solve"]

_CLOSE = 1e-8  # of the rating: a plan that rates less by no more counts as no better
_RATING = 100.0  # about what the programme's ratings are, whatever they are in ms: HiGHS's tolerances are absolute,
_TOLERANCE = 1e-9  # and this is what it keeps rows and whole numbers to


@dataclass(frozen=True)
class Solved:
    """What the programme proved.

    Args:
        plan: The best plan known; None: the deadline came before the first one.
        bound: No plan rates less (ms).
        optimal: Whether the plan is the best one (to two hundred-millionths of its rating).
    """

    plan: Plan | None
    bound: float
    optimal: bool


def columns(problem: Problem, rating: float = np.inf) -> int:
    """About how many columns the programme of all plans below a rating (ms) has: what to ask before `solve`."""
    used = summarise(problem).peak <= rating
    return int(used.sum() + (used & (problem.spread != Spread.ALL)).sum() * problem.ranks)


def solve(problem: Problem, *, start: Plan | None, deadline: float | None, nodes: int | None = None) -> Solved:
    """The best plan of the problem.

    Args:
        problem: What is planned.
        start: A plan to beat (`search`'s): options that rate more alone are left out, the answer is never worse.
        deadline: Moment of `time.monotonic()` (s) at which to stop with the best so far; None: no clock.
        nodes: Branches of the search tree after which to stop; the same on every run. None: not counted; 0: only the
            root, for the bound, without a search for plans.

    Raises:
        Infeasible: No plan keeps to the ranks' memory, which is proved (only without a start).
    """
    merged = merge(problem)
    small = merged.problem
    least = lower_bound(problem)
    if not np.isfinite(least):
        raise diagnose(small, 0, deadline=deadline)
    if start is not None and start.rating <= least * (1 + _CLOSE):
        return Solved(start, least, True)
    rating = start.rating * (1 - _CLOSE / 2) if start is not None else np.inf
    unit = next(value for value in (rating, least, float(small.cost.max()), 1.0) if 0 < value < np.inf) / _RATING
    shares = replace(small, cost=small.cost / unit, base=small.base / unit)
    programme = build(shares, summarise(shares), rating / unit)
    proved = least
    for tighter in (0.0, 1e-7):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        none_fits, values, dual = _run(programme, least / unit, left, nodes, tighter)
        if tighter == 0.0 and merged.complete:
            if none_fits:
                if start is None:
                    raise diagnose(small, 0, proven=True, deadline=deadline)
                return Solved(start, max(least, rating * (1 - _CLOSE)), True)
            proved = max(least, min(dual * unit, rating) * (1 - _CLOSE))
        if values is None:
            break
        option, ranks = programme.choices(values, small)
        try:
            found = merged.expand(make_plan(small, option, ranks))
        except ValueError:  # memory over by the solver's tolerance: once more with a little less of it
            continue
        if start is None or found.rating < start.rating:
            start = found
        break
    if start is None:
        return Solved(None, proved, False)
    proved = min(proved, float(loads(problem, start).cost.max()))
    return Solved(start, proved, start.rating <= proved * (1 + 2 * _CLOSE))


class _Answer(NamedTuple):
    none_fits: bool
    values: NDArray[np.float64] | None  # of the columns; None: no solution was found
    dual: float  # no solution is less


def _run(programme: Programme, least: float, left: float | None, nodes: int | None, tighter: float) -> _Answer:
    rows, columns_ = len(programme.low), len(programme.upper)
    matrix = csc_array((programme.value, (programme.row, programme.column)), shape=(rows, columns_))
    low, high = np.array(programme.low), np.array(programme.high)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = columns_, rows
    lp.col_cost_ = np.eye(1, columns_).ravel()
    lp.col_lower_ = least * (1 - 1e-9) * np.eye(1, columns_).ravel()
    lp.col_upper_ = np.array(programme.upper)
    lp.row_lower_ = low
    lp.row_upper_ = np.where(np.isneginf(low) & (high > 0), high * (1 - tighter), high)  # memory's rows only
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
    kinds = [highspy.HighsVarType.kContinuous] + [highspy.HighsVarType.kInteger] * (columns_ - 1)
    lp.integrality_ = kinds
    solver = highs.solver(
        mip_rel_gap=_CLOSE / 2,
        mip_abs_gap=0.0,
        primal_feasibility_tolerance=_TOLERANCE,
        mip_feasibility_tolerance=_TOLERANCE,
    )
    if left is not None:
        solver.setOptionValue("time_limit", left)
    if nodes is not None:
        solver.setOptionValue("mip_max_nodes", max(nodes, 1))
    if nodes == 0:
        solver.setOptionValue("mip_heuristic_effort", 0.0)
        solver.setOptionValue("mip_heuristic_run_rens", False)
        solver.setOptionValue("mip_heuristic_run_rins", False)
    solver.passModel(lp)
    solver.run()
    status, info = solver.getModelStatus(), solver.getInfo()
    none_fits = status in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible)
    found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    values = np.array(solver.getSolution().col_value) if found else None
    dual = float(info.mip_dual_bound)
    return _Answer(none_fits, values, dual if np.isfinite(dual) else least)

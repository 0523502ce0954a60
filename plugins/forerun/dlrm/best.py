"""The best plan that the time allows, and how far from the best possible it may be."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from forerun.dlrm.bound import lower_bound
from forerun.dlrm.decompose import pattern_bound
from forerun.dlrm.exact import Solved, columns, solve
from forerun.dlrm.infeasible import Infeasible
from forerun.dlrm.problem import Plan, Problem, validate
from forerun.dlrm.search import search

__all__ = ["Result", "best_plan"]

_BRANCHED = 1500  # columns of a programme that is solved whatever the time: seconds
_FEW = 128  # tables for which search goes on where the programme leaves a gap
_MORE = 1e7  # work of that search
_CLOSE = 2e-8  # of the bound: a plan so close to it counts as the best one


@dataclass(frozen=True)
class Result:
    """A plan and what is known of it.

    Args:
        plan: The plan.
        bound: No plan rates less (ms).
        proven: Whether the plan is the best one (to two hundred-millionths of its rating).
        source: What found it: "search", "exact", or "candidate".
    """

    plan: Plan
    bound: float
    proven: bool
    source: str

    @property
    def gap(self) -> float:
        """By what share of the bound the plan may be above the best one; 0: it is the best one."""
        return 0.0 if self.proven or self.bound <= 0 else max(self.plan.rating / self.bound - 1, 0.0)


def best_plan(
    problem: Problem,
    *,
    seed: int = 0,
    work: float | None = None,
    deadline: float | None = None,
    exact_columns: int = 25_000,
    exact_nodes: int = 1000,
    exact_seconds: float = 60.0,
    candidates: Sequence[Plan] = (),
) -> Result:
    """Search, then, for few tables, the integer programme, the bound by hosts' patterns, and, unproven, more search.

    Args:
        problem: What is planned.
        seed: Of the search.
        work: Of the search; None: its own default, and ten million where more search follows.
        deadline: Moment of `time.monotonic()` (s) at which to be done; None: counts of work end both, and the same
            input gives the same plan.
        exact_columns: The integer programme is asked if it has no more columns (`exact.columns`) below the rating that
            the search found; 0: never.
        exact_nodes: Its branches, without a deadline; from 1,500 columns on only its root, for the bound (where the
            search found no plan, for a plan).
        exact_seconds: Its time at most, with a deadline (s).
        candidates: Other planners' plans; the answer is worse than none of them.

    Raises:
        Infeasible: No plan was found that keeps to the ranks' memory.
        ValueError: A candidate is no plan of the problem.
    """
    for candidate in candidates:
        validate(problem, candidate)
    start = min(candidates, key=lambda plan: plan.rating, default=None)
    source = "candidate"
    few = columns(problem) <= 4 * exact_columns
    failure: Infeasible | None = None
    try:
        # Half the time is the search's: the programme only improves on a plan that is good already.
        half = deadline if deadline is None or not few else (time.monotonic() + deadline) / 2
        found = search(problem, seed=seed, work=work, deadline=half, start=start)
        if found is not start:
            start, source = found, "search"
    except Infeasible as misfit:
        if start is None and misfit.proven:
            raise
        failure = misfit
    bound, proven = lower_bound(problem), False
    size = columns(problem, np.inf if start is None else start.rating)
    if size <= exact_columns and (start is None or start.rating > bound * (1 + _CLOSE)):
        nodes = None
        if deadline is None:
            root = 0 if start is not None else 1
            nodes = exact_nodes if size <= _BRANCHED else root
        until = None if deadline is None else min(deadline, time.monotonic() + exact_seconds)
        solved = _solved(problem, start, until, nodes)
        bound, proven = max(bound, solved.bound), solved.optimal
        if solved.plan is not None and solved.plan is not start:
            start, source = solved.plan, "exact"
    proven = proven or (start is not None and start.rating <= bound * (1 + _CLOSE))
    if start is not None and not proven and work is None and problem.tables <= _FEW:
        bound = pattern_bound(problem, start.rating, bound, deadline=deadline)
        proven = start.rating <= bound * (1 + _CLOSE)
    if start is not None and failure is None and not proven and work is None and problem.tables <= _FEW:
        # Not from the plan that is known: another start ends in another corner.
        found = search(problem, seed=seed, work=_MORE, deadline=deadline)
        if found.rating < start.rating:
            start, source = found, "search"
    if start is None:
        assert failure is not None  # a search that does not fail gives a plan
        raise failure
    return Result(start, bound, proven or start.rating <= bound * (1 + _CLOSE), source)


def _solved(problem: Problem, start: Plan | None, deadline: float | None, nodes: int | None) -> Solved:
    """The integer programme's answer; ranks of unlike memory are asked first as if all had the most.

    No plan of the ranks as they are rates less than the best of those, which is far quicker to prove: like ranks may
    change places.
    """
    most = np.broadcast_to(problem.capacity.max(0), problem.capacity.shape)
    bound = 0.0
    if start is not None and (most != problem.capacity).any():
        bound = solve(replace(problem, capacity=most.copy()), start=start, deadline=deadline, nodes=nodes).bound
        if start.rating <= bound * (1 + _CLOSE):
            return Solved(start, bound, True)
    solved = solve(problem, start=start, deadline=deadline, nodes=nodes)
    return replace(solved, bound=max(bound, solved.bound))

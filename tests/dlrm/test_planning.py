"""Bounds, searches and the integer programme against all plans of small problems."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instances import best_rating
from small_problems import problems

from forerun.dlrm.best import best_plan
from forerun.dlrm.bound import lower_bound, volume_bound
from forerun.dlrm.exact import solve
from forerun.dlrm.infeasible import Infeasible
from forerun.dlrm.problem import loads, validate
from forerun.dlrm.search import search

few = settings(max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True)


def soon():
    return time.monotonic() + 30


@few
@given(problems())
def test_no_plan_goes_below_the_bound(problem):
    best = best_rating(problem)
    assert volume_bound(problem) <= lower_bound(problem) + 1e-9
    assert lower_bound(problem) <= best + 1e-9


@few
@given(problems())
def test_the_programme_finds_the_best_plan_or_proves_that_none_fits(problem):
    best = best_rating(problem)
    if np.isinf(best):
        with pytest.raises(Infeasible) as misfit:
            solve(problem, start=None, deadline=soon())
        assert misfit.value.proven
        return
    solved = solve(problem, start=None, deadline=soon())
    validate(problem, solved.plan)
    assert solved.optimal
    assert solved.plan.rating == pytest.approx(best, abs=1e-5)
    assert solved.bound <= best + 1e-5


@few
@given(problems(), st.sampled_from([1e-9, 1e-5, 1e7]))
def test_proofs_do_not_depend_on_the_unit_of_costs(problem, unit):
    problem = replace(problem, cost=problem.cost * unit, base=problem.base * unit)
    best = best_rating(problem)
    if np.isinf(best):
        return
    solved = solve(problem, start=None, deadline=soon())
    assert solved.optimal
    assert best * (1 - 1e-7) <= solved.bound <= best * (1 + 1e-12)
    assert solved.plan.rating <= best * (1 + 1e-7)
    assert lower_bound(problem) <= best * (1 + 1e-12)


@few
@given(problems())
def test_a_search_keeps_to_the_problem_and_is_the_same_again(problem):
    best = best_rating(problem)
    try:
        plan = search(problem, work=10_000)
    except Infeasible as misfit:
        assert np.isinf(best) or not misfit.proven
        return
    validate(problem, plan)
    assert plan.rating >= best - 1e-9
    again = search(problem, work=10_000)
    assert again.option.tolist() == plan.option.tolist()
    assert [r.tolist() for r in again.ranks] == [r.tolist() for r in plan.ranks]


@few
@given(problems(roomy=True))
def test_a_search_with_memory_to_spare_is_near_the_best_of_small_problems(problem):
    best = best_rating(problem)
    assert best - 1e-9 <= search(problem, work=60_000).rating <= best * 1.1 + 1e-9


@few
@given(problems())
def test_best_plan_is_best_and_fails_only_where_nothing_fits(problem):
    best = best_rating(problem)
    if np.isinf(best):
        with pytest.raises(Infeasible) as misfit:
            best_plan(problem, work=5_000, deadline=soon())
        assert misfit.value.proven
        assert misfit.value.missing > 0
        return
    result = best_plan(problem, work=5_000, deadline=soon())
    validate(problem, result.plan)
    assert result.proven
    assert result.plan.rating == pytest.approx(best, abs=1e-5)
    assert loads(problem, result.plan).cost.max() == pytest.approx(result.plan.rating)

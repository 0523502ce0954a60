"""The bound by hosts' patterns: below all plans of small problems, and up to the best where volume says too little."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instances import assemble, best_rating, synthetic
from small_problems import problems

from forerun.dlrm.best import best_plan
from forerun.dlrm.bound import lower_bound
from forerun.dlrm.decompose import pattern_bound
from forerun.dlrm.problem import Spread


@settings(max_examples=300, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problems(), st.sampled_from([1.0, 1e-7, 1e6]))
def test_no_plan_goes_below_the_bound(problem, unit):
    best = best_rating(problem) * unit
    if np.isinf(best) or best == 0:
        return
    scaled = type(problem)(**{**vars_of(problem), "cost": problem.cost * unit, "base": problem.base * unit})
    for known in (best, 1.3 * best, 4 * best):
        assert pattern_bound(scaled, known, 0.0) <= best * (1 + 1e-12)


def vars_of(problem):
    return {name: getattr(problem, name) for name in type(problem).__dataclass_fields__}


def hosts_of_two(tables, hosts, **rest):
    ranks = 2 * hosts
    return assemble(tables, [[100]] * ranks, np.arange(ranks) // 2, **rest)


def test_three_tables_of_two_halves_do_not_fit_on_two_hosts():
    # Each table takes 4 ms on both ranks of a host: two hosts of 12 ms of work in all, 6 by volume, 8 by any plan.
    problem = hosts_of_two([[(Spread.HOST, [4, 4], [[0], [0]])]] * 3, 2)
    assert lower_bound(problem) == pytest.approx(6)
    assert pattern_bound(problem, 9.0, 6.0) == pytest.approx(8, abs=0.07)
    assert pattern_bound(problem, 8.0, 6.0) == pytest.approx(8)


def test_what_would_lie_on_all_ranks_counts_on_all():
    # Left over, the third table may also take 1.5 ms on every rank.
    shared = (Spread.ALL, [1.5] * 4, [[0]] * 4)
    problem = hosts_of_two([[(Spread.HOST, [4, 4], [[0], [0]]), shared]] * 3, 2)
    assert best_rating(problem) == 4.5  # all of them on all ranks
    assert pattern_bound(problem, 5.5, 4.0) == pytest.approx(4.5, abs=0.04)


def test_memory_of_a_rank_is_kept():
    # Two of three shards of 60 bytes, in ranks of 100: the third table takes its other option, of 10, beside one.
    problem = assemble([[(Spread.ANY, [1], [[60]]), (Spread.ANY, [9], [[10]])]] * 3, [[100]] * 2, [0, 1])
    assert best_rating(problem) == 10
    assert lower_bound(problem) < 6
    assert pattern_bound(problem, 10.0, 5.0) == pytest.approx(10)


def test_large_hosts_and_little_work_leave_the_bound_that_is_known():
    assert pattern_bound(synthetic(8, 8, ranks_per_host=8), 1e3, 0.5) == 0.5
    problem = hosts_of_two([[(Spread.HOST, [4, 4], [[0], [0]])]] * 3, 2)
    assert pattern_bound(problem, 9.0, 6.0, work=0) == 6.0
    assert pattern_bound(problem, 9.0, 6.0, deadline=0.0) == 6.0


def test_a_plan_on_hosts_of_two_is_proven_the_best():
    # As MLPerf's tables on hosts of two: each on a rank or in two halves, some rather on all ranks.
    random = np.random.default_rng(0)
    tables = []
    for whole, shared in zip(random.uniform(5, 6.5, 13), random.lognormal(0, 1.5, 13), strict=True):
        half = whole / 2 + 0.24
        tables.append(
            [
                (Spread.ANY, [whole], [[0]]),
                (Spread.HOST, [half, half], [[0], [0]]),
                (Spread.ALL, [shared] * 8, [[0]] * 8),
            ]
        )
    problem = hosts_of_two(tables, 4)
    result = best_plan(problem, exact_columns=0)
    assert result.plan.rating > 1.02 * lower_bound(problem)
    assert result.proven

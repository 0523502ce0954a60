"""Known answers, what does not fit, other planners' plans, and how the work grows."""

import time
from dataclasses import replace

import numpy as np
import pytest
from instances import assemble, synthetic

from forerun.dlrm import search as search_module
from forerun.dlrm.best import best_plan
from forerun.dlrm.bound import lower_bound, volume_bound
from forerun.dlrm.budget import Budget
from forerun.dlrm.exact import solve
from forerun.dlrm.infeasible import Infeasible
from forerun.dlrm.problem import Spread, loads, make_plan, validate
from forerun.dlrm.search import search


def single(costs, memory=0):
    """Tables with one option: one shard on any rank."""
    return [[(Spread.ANY, [cost], [[memory]])] for cost in costs]


def test_the_bound_is_the_volume_or_the_largest_shard():
    assert volume_bound(assemble(single([1, 2, 3]), [[0]] * 2, [0, 0])) == pytest.approx(3)
    assert volume_bound(assemble(single([1, 1, 9]), [[0]] * 2, [0, 0])) == 9


def test_the_bound_admits_a_dearer_option_only_where_the_cheap_one_is_too_large():
    # One shard of 8, or two of 5: at T < 8 the table costs 10, so (10 + 2) / 2 = 6 is the bound, not 8 nor (8 + 2) / 2.
    table = [(Spread.ANY, [8], [[0]]), (Spread.ANY, [5, 5], [[0], [0]])]
    problem = assemble([table, *single([2])], [[0]] * 2, [0, 0])
    assert volume_bound(problem) == pytest.approx(6)
    # Beside 7 ms more, two shards need (10 + 7) / 2 = 8.5: with one of 8, T = 8 is enough.
    assert volume_bound(assemble([table, *single([7])], [[0]] * 2, [0, 0])) == pytest.approx(8)


def test_what_lies_on_all_ranks_and_base_count_where_they_are():
    everywhere = [[(Spread.ALL, [2, 1], [[0], [0]])]]
    assert volume_bound(assemble(everywhere, [[0]] * 2, [0, 0], base=np.array([3.0, 0]))) == 5
    assert volume_bound(assemble(single([2]), [[0]] * 2, [0, 0], base=np.array([9.0, 0]))) == 9


def test_memory_tightens_the_bound():
    # Two tables, each 1 ms in 6 bytes of the fast tier or 4 ms in the slow one; 10 fast bytes hold one of them.
    table = [(Spread.ANY, [1], [[6, 0]]), (Spread.ANY, [4], [[0, 6]])]
    problem = assemble([table, table], [[10, 100]], [0])
    assert volume_bound(problem) == pytest.approx(2)
    assert lower_bound(problem) > 2.9
    assert best_plan(problem, deadline=time.monotonic() + 20).plan.rating == 5


def test_lpt_is_improved_to_the_best():
    # Longest first gives 5 + 4 + 3 against 5 + 4: 3 3 2 2 2 on two ranks can be 6 and 6.
    assert search(assemble(single([3, 3, 2, 2, 2]), [[0]] * 2, [0, 0])).rating == 6


def test_a_tiny_table_is_copied_to_every_rank_when_that_is_cheaper():
    tables = [*single([4, 4]), [(Spread.ANY, [3], [[0]]), (Spread.ALL, [0.5, 0.5], [[1], [1]])]]
    assert search(assemble(tables, [[1]] * 2, [0, 0])).rating == 4.5
    # No memory for the copies: the table goes to one rank.
    assert search(assemble(tables, [[0]] * 2, [0, 0])).rating == 7


def test_a_table_too_large_for_every_rank_is_named():
    problem = assemble(single([1, 1], 5) + single([1], 30), [[20]] * 2, [0, 0])
    with pytest.raises(Infeasible, match=r"table 2.*10 bytes of tier 0 are missing; 10 bytes more") as misfit:
        search(problem)
    assert (misfit.value.table, misfit.value.tier, misfit.value.missing) == (2, 0, 10)
    assert misfit.value.proven
    assert misfit.value.enough == 10


def test_tables_too_large_together_are_told_with_what_would_be_enough():
    with pytest.raises(Infeasible) as misfit:
        search(assemble(single([1] * 6, 10), [[25]] * 2, [0, 0]))
    assert (misfit.value.missing, misfit.value.enough, misfit.value.proven) == (10, 5, True)


def test_tables_that_fit_together_but_not_apart_are_told_so_and_proved_when_asked():
    problem = assemble(single([1] * 3, 10), [[15]] * 2, [0, 0])  # 30 bytes in 30, but in pieces of 10
    with pytest.raises(Infeasible) as misfit:
        search(problem)
    assert (misfit.value.enough, misfit.value.proven) == (5, False)
    with pytest.raises(Infeasible) as misfit:
        best_plan(problem, deadline=time.monotonic() + 20)
    assert misfit.value.proven


def test_after_the_deadline_it_is_not_asked_what_would_be_enough():
    problem = assemble(single([1] * 6, 10), [[25]] * 2, [0, 0])
    with pytest.raises(Infeasible, match=r"10 bytes of tier 0 are missing$") as misfit:
        search(problem, deadline=time.monotonic() - 1)
    assert (misfit.value.missing, misfit.value.enough, misfit.value.hurried) == (10, None, True)


def test_a_plan_that_breaks_memory_by_the_solvers_tolerance_is_asked_for_again():
    # Ranks of 2**53 bytes: a solver that counts in floating point takes one byte more than there is for nothing.
    most = 2**53
    tables = [*single([1], most // 2), *single([1], most // 2 + 1)]
    problem = assemble(tables, [[most]] * 2, [0, 0], base=np.array([0, 1.5]))
    solved = solve(problem, start=None, deadline=time.monotonic() + 20)
    assert solved.plan is not None  # together on the first rank they would rate 2
    assert solved.plan.rating == 2.5


def test_the_answer_is_never_worse_than_a_candidate():
    problem = synthetic(12, 4, seed=1, ranks_per_host=2, fill=0.1)
    other = search(problem, seed=5)
    assert best_plan(problem, work=0, candidates=[other]).plan.rating <= other.rating
    worse = make_plan(problem, problem.option_start[:-1], [[f % 4] for f in range(12)])
    assert best_plan(problem, candidates=[worse, other]).plan.rating <= other.rating
    with pytest.raises(ValueError, match="12 placements for 3 tables"):
        best_plan(assemble(single([1] * 3), [[0]] * 2, [0, 0]), candidates=[worse])


def test_the_programme_proves_or_improves_a_plan_of_few_tables():
    problem = synthetic(8, 4, ranks_per_host=4)
    quick = best_plan(problem, work=0)
    result = best_plan(problem, work=0, deadline=time.monotonic() + 60)
    assert result.proven
    assert result.gap == 0
    assert lower_bound(problem) <= result.bound <= result.plan.rating <= quick.plan.rating


def test_ranks_of_unlike_memory_are_proved_by_those_of_the_most():
    problem = synthetic(8, 4, ranks_per_host=4)
    capacity = problem.capacity.copy()
    capacity[::2] //= 2
    unlike = replace(problem, capacity=capacity)
    result = best_plan(unlike, work=300_000)
    validate(unlike, result.plan)
    solved = solve(unlike, start=None, deadline=time.monotonic() + 60)
    assert result.proven
    assert result.plan.rating == pytest.approx(solved.plan.rating, rel=1e-7)
    assert result.bound <= solved.plan.rating * (1 + 1e-12)


@pytest.mark.parametrize("fill", [0.3, 0.9])
@pytest.mark.parametrize(("tables", "ranks"), [(100, 8), (200, 16), (300, 32)])
def test_plans_of_many_tables_are_near_the_bound(tables, ranks, fill):
    problem = synthetic(tables, ranks, fill=fill, seed=tables)
    plan = search(problem, work=300_000)
    validate(problem, plan)
    assert plan.rating <= 1.05 * lower_bound(problem)


def test_ranks_of_different_size_and_head_start():
    random = np.random.default_rng(0)
    problem = synthetic(60, 8, fill=0.6, seed=2)
    capacity = (problem.capacity * random.uniform(0.5, 1.5, (8, 1))).astype(np.int64)
    uneven = type(problem)(
        problem.option_start,
        problem.shard_start,
        problem.spread,
        problem.cost,
        problem.memory,
        capacity,
        problem.host,
        base=random.uniform(0, 5, 8),
    )
    plan = search(uneven, work=300_000)
    validate(uneven, plan)
    assert (loads(uneven, plan).memory <= capacity).all()
    assert plan.rating <= 1.05 * lower_bound(uneven)


def test_the_work_of_a_first_plan_grows_with_the_tables(monkeypatch):
    counted = []

    class Counted(Budget):
        def __init__(self, work, deadline=None):
            super().__init__(work, deadline)
            counted.append(self)

    monkeypatch.setattr(search_module, "Budget", Counted)
    spent = []
    for tables in (100, 200, 400):
        problem = synthetic(tables, 16, seed=1)
        search(problem, work=0)
        spent.append(counted[-1].spent)
        assert spent[-1] < 500 * len(problem.spread)
    assert spent[2] < 5 * spent[0]


def test_a_deadline_that_is_past_still_gives_a_plan():
    problem = synthetic(40, 8)
    plan = search(problem, deadline=time.monotonic() - 1)
    validate(problem, plan)

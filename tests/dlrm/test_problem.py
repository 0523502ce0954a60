"""What a problem refuses, what a plan must keep to."""

import re

import numpy as np
import pytest
from instances import assemble, synthetic

from forerun.dlrm.merge import merge
from forerun.dlrm.problem import Plan, Spread, loads, make_plan, validate

HOSTS = [0, 0, 1, 1]


def two_tables(**rest):
    """Table 0 on one rank or in 2 columns, table 1 on one host or on all 4 ranks."""
    one = [(Spread.ANY, [3], [[10]]), (Spread.ANY, [2, 2], [[5], [5]])]
    other = [(Spread.HOST, [1, 1], [[4], [4]]), (Spread.ALL, [1] * 4, [[2]] * 4)]
    return assemble([one, other], [[12]] * 4, HOSTS, **rest)


def test_loads_are_base_plus_what_lies_on_a_rank():
    problem = two_tables(base=np.array([1.0, 0, 0, 0]))
    plan = make_plan(problem, [1, 2], [[0, 3], [2, 3]])
    cost, memory = loads(problem, plan)
    assert cost.tolist() == [3, 0, 1, 3]
    assert memory[:, 0].tolist() == [5, 0, 4, 9]
    assert plan.rating == 3


@pytest.mark.parametrize(
    ("option", "ranks", "message"),
    [
        ([2, 2], [[0], [0, 1]], "table 0 has option 2"),
        ([0, 2], [[0, 1], [0, 1]], "2 ranks for 1 shards"),
        ([0, 2], [[4], [0, 1]], "a rank outside 0..3"),
        ([0, 2], [[0], [1, 2]], "not in order on the ranks of one host"),
        ([0, 2], [[0], [1, 0]], "not in order on the ranks of one host"),
        ([0, 3], [[0], [1, 0, 2, 3]], "not on all ranks in order"),
        ([0, 2], [[0], [0, 1]], "rank 0, tier 0: 14 bytes exceed its 12"),
    ],
)
def test_a_plan_off_the_problem_is_refused(option, ranks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan(two_tables(), option, ranks)


def test_a_wrong_rating_is_refused():
    problem = two_tables()
    plan = make_plan(problem, [0, 2], [[0], [2, 3]])
    with pytest.raises(ValueError, match="rating 2"):
        validate(problem, Plan(plan.option, plan.ranks, 2.0))


@pytest.mark.parametrize(
    ("spread", "shards", "ranks", "wrong"),
    [
        (Spread.WITHIN, 2, [1, 2], "not on one host"),
        (Spread.APART, 2, [1, 1], "two shards on one rank"),
        (Spread.HOSTS, 4, [0, 1, 0, 1], "a host used again"),
        (Spread.HOSTS, 4, [0, 2, 1, 3], "ranks of whole hosts"),
    ],
)
def test_each_spread_has_its_rule(spread, shards, ranks, wrong):
    problem = assemble([[(spread, [1] * shards, [[0]] * shards)]], [[1]] * 4, HOSTS)
    with pytest.raises(ValueError, match=wrong):
        make_plan(problem, [0], [ranks])


def test_more_shards_than_ranks_go_around_the_hosts():
    problem = assemble([[(Spread.HOSTS, [1] * 6, [[0]] * 6)]], [[1]] * 4, HOSTS)
    assert make_plan(problem, [0], [[2, 3, 0, 1, 2, 3]]).rating == 2


def test_groups_must_be_together():
    tables = [[(Spread.ANY, [1], [[0]])], [(Spread.ANY, [1], [[0]])]]
    same_ranks = assemble(tables, [[1]] * 4, HOSTS, group=np.array([7, 7]))
    same_host = assemble(tables, [[1]] * 4, HOSTS, host_group=np.array([7, 7]))
    assert make_plan(same_ranks, [0, 1], [[2], [2]]).rating == 2
    with pytest.raises(ValueError, match="tables 0 and 1 are not together"):
        make_plan(same_ranks, [0, 1], [[2], [3]])
    assert make_plan(same_host, [0, 1], [[2], [3]]).rating == 1
    with pytest.raises(ValueError, match="not on one host"):
        make_plan(same_host, [0, 1], [[1], [2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacity": [[12]] * 3, "host": [0, 0, 1]}, "an option on all 3 ranks has 4"),
        ({"host": [0, 1, 0, 1]}, "next to each other"),
        ({"base": np.array([0, 0, 0, np.nan])}, "base has a value"),
        ({"base": np.zeros(3)}, "base has shape [3]; expected [4]"),
        ({"group": np.array([-2, 0])}, "group has a number below -1"),
        ({"group": np.array([0.5, 0])}, "group has dtype float64"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(change, message):
    given = {"capacity": [[12]] * 4, "host": HOSTS, **change}
    one = [(Spread.ANY, [3], [[10]])]
    other = [(Spread.ALL, [1] * 4, [[2]] * 4)]
    with pytest.raises(ValueError, match=re.escape(message)):
        assemble([one, other], given.pop("capacity"), given.pop("host"), **given)


def test_a_group_without_anything_in_common_is_refused():
    tables = [[(Spread.ANY, [1], [[0]])], [(Spread.ANY, [1, 1], [[0], [0]])]]
    with pytest.raises(ValueError, match="no spread and number of shards in common"):
        merge(assemble(tables, [[1]] * 4, HOSTS, group=np.array([0, 0])))


def test_a_group_of_many_tables_keeps_few_combinations_and_says_so():
    problem = synthetic(12, 4, seed=3)
    grouped = assemble(
        [
            [(Spread.ANY, [float(k)], [[100 - k * k, 50 - k]]) for k in range(1 + f % 3, 9)]
            for f in range(problem.tables)
        ],
        [[2000, 2000]] * 4,
        [0, 0, 0, 0],
        group=np.zeros(12, int),
    )
    merged = merge(grouped)
    assert merged.problem.tables == 1
    assert len(merged.choices) <= 64
    assert not merged.complete

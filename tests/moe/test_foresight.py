"""Where a batch's tokens go: by the plan, the look-back, or their order where nothing is known."""

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import random_profile

from forerun.moe.foresight import Foresight, even
from forerun.moe.planning import make_plan
from forerun.moe.shuffle import assign, shuffle

PLAN = make_plan(random_profile()[0], 4, effort=1)


def assert_same(one, other):
    assert torch.equal(one.order, other.order)
    assert torch.equal(one.inverse, other.inverse)
    assert one.sizes == other.sizes


@settings(max_examples=40)
@given(st.integers(0, 40), st.integers(1, 5))
def test_even_chunks_keep_the_order(tokens, ranks):
    there = even(tokens, ranks)
    assert there.order.tolist() == there.inverse.tolist() == list(range(tokens))
    assert sum(there.sizes) == tokens
    assert max(there.sizes) - min(there.sizes) <= 1


def test_tokens_go_where_the_plan_expects_their_experts():
    ids = np.concatenate([PLAN.tokens[:20], [10**6, -3]])  # two that it has never seen
    foresight = Foresight(PLAN, range(4))
    foresight.begin(torch.from_numpy(ids).view(2, 11))
    for layer in range(3):
        expected = shuffle(assign(torch.from_numpy(PLAN.shares(layer, ids))), 4)
        assert_same(foresight.shuffle(layer, 22), expected)


def test_ranks_that_are_not_the_plans_take_their_columns():
    ids = PLAN.tokens[:9]
    foresight = Foresight(PLAN, [2, 3])
    foresight.begin(torch.from_numpy(ids))
    expected = shuffle(assign(torch.from_numpy(PLAN.shares(1, ids)[:, 2:])), 2)
    assert_same(foresight.shuffle(1, 9), expected)


def test_the_last_two_layers_ranks_are_looked_back_at():
    plan = dataclasses.replace(PLAN, weight=np.array([0, 0, 1.5], np.float32))
    ids, random = plan.tokens[:16], np.random.default_rng(0)
    ratio = random.random((3, 4, 4, 4)).astype(np.float32)
    plan = dataclasses.replace(plan, ratio=ratio)
    foresight = Foresight(plan, range(4))
    assert foresight.looks_back
    foresight.begin(torch.from_numpy(ids))
    ranks = random.integers(0, 4, (2, 16))
    for rank in ranks:
        foresight.saw(torch.from_numpy(rank).float())
    share = plan.lookback(2).adjusted(plan.shares(2, ids), *ranks)
    assert_same(foresight.shuffle(2, 16), shuffle(assign(torch.from_numpy(share)), 4))
    foresight.begin(torch.from_numpy(ids))  # another batch: nothing was seen of it
    assert_same(foresight.shuffle(2, 16), shuffle(assign(torch.from_numpy(plan.shares(2, ids))), 4))


def test_what_is_not_known_stays_in_order():
    foresight = Foresight(PLAN, range(4))
    assert_same(foresight.shuffle(0, 7), even(7, 4))
    foresight.begin(torch.arange(6))
    assert_same(foresight.shuffle(0, 7), even(7, 4))  # another batch than was begun
    foresight.begin(None)
    assert_same(foresight.shuffle(0, 6), even(6, 4))
    assert not Foresight(None, range(2)).looks_back

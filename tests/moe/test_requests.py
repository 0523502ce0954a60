"""Requests to data-parallel ranks: where their experts are expected, within the limit, the same for the same."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import random_profile

import forerun.moe
from forerun.moe.planning import make_plan
from forerun.moe.requests import Arrivals, assign, expected

PROFILE = random_profile()[0]
PLAN = make_plan(PROFILE, 4, effort=1)


def drawn(seed, count, longest):
    random = np.random.default_rng(seed)
    return [random.integers(0, 60, random.integers(0, longest + 1)).tolist() for _ in range(count)]


@settings(max_examples=80)
@given(st.integers(0, 10_000), st.integers(0, 40), st.integers(1, 60), st.sampled_from([1.0, 1.1, 2.0]))
def test_no_rank_has_more_than_its_limit_or_the_longest_above_the_mean(seed, count, longest, limit):
    requests = drawn(seed, count, longest)
    rank = assign(requests, PLAN, limit=limit)
    assert rank.shape == (count,)
    size = np.array([len(one) for one in requests], int)
    load, mean = np.bincount(rank, size, 4), size.sum() / 4
    assert load.max(initial=0) <= max(limit * mean, mean + size.max(initial=0)) + 1e-6
    assert assign(requests, PLAN, limit=limit).tolist() == rank.tolist()


def test_expectations_are_what_a_loop_sums():
    requests = drawn(3, 5, 30)
    for request, share in zip(requests, expected(requests, PLAN), strict=True):
        each = [PLAN.shares(layer, np.array([token]))[0] for layer in range(3) for token in request]
        assert share == pytest.approx(np.mean(each, axis=0) if each else np.full(4, 0.25), abs=1e-5)


def test_where_there_is_room_each_goes_to_its_best():
    requests = drawn(1, 12, 20)
    assert assign(requests, PLAN, limit=4.0).tolist() == expected(requests, PLAN).argmax(1).tolist()


def test_requests_of_one_kind_end_near_their_experts():
    """Ids sorted by their own best rank: nearly all that can be near its experts is, and more than in order."""
    home = PLAN.shares(0, PLAN.tokens).argmax(1)
    random = np.random.default_rng(0)
    kinds = [PLAN.tokens[home == kind] for kind in range(4)]
    requests = [random.choice(kinds[kind], 16) for kind in random.permutation(np.repeat(np.arange(4), 8))]
    ours, gained = assign(requests, PLAN), expected(requests, PLAN)
    one = np.arange(len(requests))
    assert gained[one, ours].sum() > gained[one, one % 4].sum() * 1.05
    assert gained[one, ours].sum() > 0.95 * gained.max(1).sum()


def test_tensors_arrays_and_lists_are_alike():
    requests = drawn(2, 6, 9)
    plain = assign(requests, PLAN).tolist()
    assert assign([np.array(one, int) for one in requests], PLAN).tolist() == plain
    assert forerun.moe.assign([torch.tensor([one], dtype=torch.long) for one in requests], PLAN).tolist() == plain


def test_what_is_no_request_is_refused():
    with pytest.raises(TypeError, match=re.escape("a request is float64[1]; expected its token ids")):
        assign([[1], [0.5]], PLAN)
    with pytest.raises(ValueError, match=re.escape("limit is 0.9")):
        assign([[1]], PLAN, limit=0.9)
    with pytest.raises(AttributeError, match="no attribute 'asign'"):
        getattr(forerun.moe, "asign")  # noqa: B009


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([1.0, 1.1, 2.0]))
def test_arrivals_keep_to_the_limit_too(seed, count, limit):
    arrivals, load = Arrivals(PLAN, limit=limit, memory=1 << 40), np.zeros(4)
    sizes = []
    for request in drawn(seed, count, 50):
        load[arrivals.rank(request)] += len(request)
        sizes.append(len(request))
        assert load.max() <= max(limit * load.mean(), load.mean() + max(sizes)) + 1e-6
    assert arrivals.load == pytest.approx(load)


def test_an_arrival_goes_where_its_experts_are_expected():
    for request in drawn(5, 20, 30):
        if request:
            share = expected([request], PLAN)[0]
            assert share[Arrivals(PLAN, limit=100).rank(request)] == share.max()


@pytest.mark.parametrize("ranks", [2, 4])
def test_short_requests_that_come_together_are_on_all_ranks(ranks):
    """They answer together; beside the tokens of what came before them they weigh nothing."""
    arrivals = Arrivals(make_plan(PROFILE, ranks, effort=1))
    for request in drawn(7, 200, 500):
        arrivals.rank(request)
    chosen = [arrivals.rank([3, 4]) for _ in range(8)]
    assert np.bincount(chosen, minlength=ranks).max() <= 8 / ranks + 2
    assert arrivals.load.max() <= 1.1 * arrivals.load.mean() + 1e-6


def planted(length):
    """A request whose tokens' experts are expected on one rank more than on any other, and that rank."""
    request = [max(range(60), key=lambda token: expected([[token]], PLAN)[0].max())] * length
    share = np.sort(expected([request], PLAN)[0])
    assert (share[-1] - share[0]) * 1000 >= 64 > (share[-1] - share[0]) * 8  # as the tests below take it
    return request, int(expected([request], PLAN)[0].argmax())


def test_short_requests_go_in_turn():
    arrivals, (request, _) = Arrivals(PLAN), planted(8)
    arrivals.load += 1000  # so that a few tokens more are within the limit
    for _ in range(20):
        assert sorted(arrivals.rank(request) for _ in range(4)) == [0, 1, 2, 3]


def test_a_long_request_may_go_out_of_turn_by_one():
    arrivals, (request, home) = Arrivals(PLAN, limit=100), planted(1000)
    chosen = [arrivals.rank(request) for _ in range(40)]
    assert chosen[:2] == [home, home]
    counts = np.array([np.bincount(chosen[:end], minlength=4) for end in range(1, 41)])
    assert (counts.max(1) - counts.mean(1) <= 3).all()
    assert counts[-1].argmax() == home


def test_arrivals_refuse_a_limit_below_one():
    with pytest.raises(ValueError, match=re.escape("limit is 0.5; expected tokens of a rank over the mean")):
        Arrivals(PLAN, limit=0.5)


def test_requests_that_wait_are_evened_out_whatever_was_answered_before():
    arrivals, (request, home) = Arrivals(PLAN, limit=100), planted(4)
    assert {arrivals.rank(request, [0] * 4) for _ in range(20)} == {home}
    waiting = [0] * 4
    for request in drawn(5, 8, 10):
        waiting[arrivals.rank(request, waiting)] += 1
    assert waiting == [2] * 4

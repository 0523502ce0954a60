"""The search for a split: sums, order, alignment, never worse than one engine, none better among all."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.runahead.chain import Chain, check_contexts
from forerun.runahead.cost import Cost, Link
from forerun.runahead.partition import search


def times(low, high):
    return st.floats(low, high, allow_subnormal=False)


costs = st.builds(Cost, times(0, 1e-2), times(1e-6, 1e-3), times(0, 1e-5), times(0, 1e-5))
links = st.builds(Link, st.one_of(st.just(math.inf), times(1e3, 1e9)), times(0, 1e-2))
chains = st.builds(Chain, costs, links, st.integers(1, 6), st.integers(0, 4096), times(0, 1), st.booleans())


def plain_ttft(chain, contexts, cached):
    """The recurrence, one layer and engine after the other."""
    finished, free = [0.0] * len(contexts), [0.0] * len(contexts)
    for _ in range(chain.layers):
        sent_by = 0.0
        for i, n in enumerate(contexts):
            past = sum(contexts[:i])
            linear = (chain.cost.fixed + chain.cost.per_token * n) / chain.layers
            pairs = 2 * (past + cached) * n + n * n
            attention = (chain.cost.per_past * (past + cached) + chain.cost.per_pair * pairs) / chain.layers
            started = finished[i] + chain.before * linear
            if i:
                free[i] = max(sent_by, free[i]) + past * chain.kv_bytes / chain.link.bandwidth
                started = max(started, free[i] + chain.link.latency)
            sent_by = started if chain.early else started + attention
            finished[i] = started + attention + (1 - chain.before) * linear
    return finished[-1]


def every_split(tokens, engines, block):
    inner = range(block, tokens, block)
    for count in range(min(engines - 1, len(inner)) + 1):
        for ends in combinations(inner, count):
            yield tuple(map(int, np.diff((0, *ends, tokens))))


@given(chains, st.lists(st.integers(1, 500), min_size=1, max_size=6), st.integers(0, 100))
def test_the_recurrence_is_the_plain_loop(chain, contexts, cached):
    times = chain.timeline(contexts, cached)
    assert float(times.ttft) == pytest.approx(plain_ttft(chain, contexts, cached))
    assert float(chain.ttft(contexts, cached)) == float(times.ttft)
    assert (times.finished >= times.attended).all()
    assert (times.attended >= times.started).all()
    assert (times.started >= np.maximum(times.ready, times.arrived)).all()
    assert float(chain.ttft([sum(contexts)], cached)) == pytest.approx(chain.single(sum(contexts), cached))


@given(chains, st.integers(1, 14), st.integers(1, 4), st.integers(1, 3), st.integers(0, 50))
def test_no_split_is_better(chain, tokens, engines, block, cached):
    found = search(chain, tokens, engines, block=block, cached=cached, slack=0)
    best = min(plain_ttft(chain, contexts, cached) for contexts in every_split(tokens, engines, block))
    assert found.ttft == pytest.approx(best)
    assert found.ttft == pytest.approx(plain_ttft(chain, found.contexts, cached))


@settings(max_examples=30)
@given(chains, st.integers(1, 20_000), st.integers(1, 9), st.sampled_from([1, 16, 128]), st.integers(0, 5000))
def test_a_split_is_one(chain, tokens, engines, block, cached):
    found = search(chain, tokens, engines, block=block, cached=cached)
    check_contexts(found.contexts, tokens)
    assert len(found.contexts) <= engines
    assert list(found.bounds) == sorted(set(found.bounds))
    assert all(start % block == 0 for start in found.bounds[:-1])
    assert found.ttft <= found.single == chain.single(tokens, cached)


@pytest.mark.parametrize("seed", range(8))
def test_a_long_prompts_split_is_hardly_bettered(seed):
    """Too many splits to try all: random ones, each moved at random while that helps, find nothing much better."""
    rng = np.random.default_rng(seed)
    tokens, engines = int(rng.integers(3000, 20_000)), int(rng.integers(2, 7))
    cost = Cost(10 ** rng.uniform(-5, -2), 10 ** rng.uniform(-5, -3), 0, 10 ** rng.uniform(-10, -7))
    link = Link(10 ** rng.uniform(8, 11), 10 ** rng.uniform(-5, -3))
    chain = Chain(cost, link, int(rng.integers(2, 40)), int(rng.integers(256, 16384)), early=bool(seed % 2))

    def contexts(bounds):
        split = np.diff(np.sort(bounds, 1), axis=1, prepend=0, append=tokens)
        return split[(split > 0).all(1)]

    best = contexts(rng.integers(1, tokens, (2000, engines - 1)))
    best = best[chain.ttft(best).argmin()]
    for turn in range(60):
        moves = np.rint(rng.normal(0, 0.3 * tokens * 0.85**turn, (200, engines - 1)))
        near = contexts(np.concatenate([[np.cumsum(best)[:-1]], np.cumsum(best)[:-1] + moves]))
        best = near[chain.ttft(near).argmin()]
    assert search(chain, tokens, engines, slack=0).ttft <= float(chain.ttft(best)) * 1.002


def test_later_contexts_are_shorter_where_transfers_are_free():
    chain = Chain(Cost(0, 1e-4, 0, 1e-8), Link(math.inf), 32, 1000)
    contexts = search(chain, 8192, 4, block=32).contexts
    assert len(contexts) == 4
    assert list(contexts) == sorted(contexts, reverse=True)


def test_a_slow_link_leaves_one_engine():
    chain = Chain(Cost(0, 1e-4, 0, 1e-8), Link(1e3), 32, 1000)
    assert search(chain, 8192, 4).contexts == (8192,)


def test_an_engine_that_gains_too_little_stays_out():
    chain = Chain(Cost(0, 1e-4, 0, 1e-9), Link(2e8), 32, 1000)
    best = search(chain, 4096, 4, slack=0)
    modest = search(chain, 4096, 4, slack=0.9)
    assert len(modest.contexts) < len(best.contexts)
    assert modest.ttft <= best.ttft * 1.9


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"engines": 0}, "engines is 0"),
        ({"block": 0}, "block is 0"),
        ({"cached": -1}, "cached is -1"),
        ({"fewest": 3}, "fewest is 3"),
        ({"slack": -0.1}, "slack -0.1"),
    ],
)
def test_a_wrong_number_is_named(wrong, told):
    chain = Chain(Cost(0, 1e-4, 0, 0), Link(math.inf), 1, 1)
    with pytest.raises(ValueError, match=told):
        search(chain, **{"tokens": 10, "engines": 2, **wrong})

"""Passes over several sequences, split over ranks."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.runahead.batch import Batch, as_one, divide
from forerun.runahead.chain import Chain
from forerun.runahead.cost import Cost, Link

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=6)


@st.composite
def shares(draw, most=5):
    parts = draw(st.lists(st.integers(1, 20), min_size=1, max_size=most))
    return tuple(part / sum(parts) for part in parts)


@st.composite
def batches(draw):
    lengths = draw(LENGTHS)
    cached = draw(st.lists(st.integers(0, 100), min_size=len(lengths), max_size=len(lengths)))
    return Batch(divide(lengths, draw(shares())), tuple(cached))


@given(LENGTHS, shares())
def test_contexts_add_up_and_are_near_their_shares(lengths, given_shares):
    for n, contexts in zip(lengths, divide(lengths, given_shares), strict=True):
        assert sum(contexts) == n and contexts[-1] >= 1
        for context, share in zip(contexts, given_shares, strict=True):
            assert abs(context - share * n) <= 1 or contexts[-1] == 1  # the last token is the last rank's


@given(batches())
def test_every_row_has_one_rank(batch):
    rows = [row for rank in range(batch.ranks) for row in batch.rows(rank)]
    assert sorted(rows) == list(range(sum(batch.totals)))
    assert rows == batch.order(batch.ranks)
    assert [len(batch.rows(rank)) for rank in range(batch.ranks)] == list(batch.totals)
    assert set(batch.lasts()) <= set(batch.rows(batch.ranks - 1))


@given(batches())
def test_queries_attend_to_all_before_them(batch):
    for rank in range(batch.ranks):
        queries, keys = batch.queries(rank), batch.keys(rank)
        ahead = [sum(own[rank + 1 :]) for own in batch.contexts]
        totals = [past + sum(own) for past, own in zip(batch.cached, batch.contexts, strict=True)]
        assert [n + rest for n, rest in zip(keys, ahead, strict=True)] == totals
        assert all(seen >= own for seen, own in zip(keys, queries, strict=True))


@given(LENGTHS, st.data())
def test_one_prompt_stands_for_many(lengths, data):
    cached = data.draw(st.lists(st.integers(0, 500), min_size=len(lengths), max_size=len(lengths)))
    start, end = sorted((data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))))
    chain = Chain(Cost(0.0, 1e-6, 0.0, 1e-9), Link(1e9), layers=2, kv_bytes=8)
    one, tokens, past = as_one(chain, lengths, cached)
    many = sum(chain.cost.attention((end - start) * n, p + start * n) for n, p in zip(lengths, cached, strict=True))
    alone = one.cost.attention((end - start) * tokens, past + start * tokens)
    rounding = one.cost.per_pair * tokens * (end - start)  # of half a cached token
    assert alone == pytest.approx(many, abs=float(rounding) + 1e-15)
    assert replace(one, cost=chain.cost) == chain


@pytest.mark.parametrize("given_shares", [(), (0.5, 0.6), (1.0, 0.0), (1.5, -0.5)])
def test_shares_that_are_none(given_shares):
    with pytest.raises(ValueError, match="add up to 1"):
        divide([10], given_shares)


@pytest.mark.parametrize(
    "contexts, cached", [((), ()), (((1, 2), (3,)), (0, 0)), (((1, 0),), (0,)), (((1, 2),), (-1,))]
)
def test_batches_that_are_none(contexts, cached):
    with pytest.raises(ValueError, match="expected"):
        Batch(contexts, cached)

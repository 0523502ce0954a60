"""How a pass is shared, and when it is not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forerun.runahead.batch import as_one
from forerun.runahead.chain import Chain
from forerun.runahead.cost import Cost, Link
from forerun.runahead.partition import search
from forerun.runahead.settings import read
from forerun.runahead.shares import FixedShares, SearchedShares, TableShares, split_pass
from forerun.runahead.table import make_table

COST = Cost(1e-3, 1e-5, 0.0, 1e-9)
FAST = Chain(COST, Link(1e10, 1e-6), layers=4, kv_bytes=512)
SLOW = Chain(COST, Link(1e4, 1.0), layers=4, kv_bytes=512)


def test_fixed_shares_are_taken_from_the_least_on():
    chooser = FixedShares((0.75, 0.25), least=8)
    assert split_pass(chooser, [7], [0]) is None
    assert split_pass(chooser, [8], [0]).contexts == ((6, 2),)


def test_a_rank_without_tokens_is_no_split():
    assert split_pass(FixedShares((0.5, 0.5)), [1, 1, 1], [9, 9, 9]) is None
    assert split_pass(FixedShares((0.5, 0.5)), [1, 1, 2], [9, 9, 9]).totals == (1, 3)


def test_no_sequence_is_no_split():
    assert split_pass(FixedShares((0.5, 0.5)), [], []) is None
    assert split_pass(FixedShares((0.5, 0.5)), [4, 0], [0, 0]) is None


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=4), st.integers(2, 4), st.data())
def test_searched_shares_are_expected_to_be_sooner(lengths, ranks, data):
    cached = data.draw(st.lists(st.integers(0, 2000), min_size=len(lengths), max_size=len(lengths)))
    for chain in (FAST, SLOW):
        found = SearchedShares(chain, ranks).shares(tuple(lengths), tuple(cached))
        one, tokens, past = as_one(chain, lengths, cached)
        if found is None:
            assert (
                chain is SLOW or tokens < ranks or search(one, tokens, ranks, fewest=ranks, cached=past).speedup < 1.3
            )
        else:
            assert math.isclose(sum(found), 1) and len(found) == ranks
            assert one.ttft([share * tokens for share in found], past) < one.single(tokens, past)


def test_a_slow_link_is_no_gain():
    assert SearchedShares(FAST, 2).shares((4096,), (0,)) is not None
    assert SearchedShares(SLOW, 2).shares((4096,), (0,)) is None


def test_attention_makes_the_first_context_longer():
    heavy = Chain(Cost(0, 1e-6, 0, 1e-8), Link(math.inf), layers=4, kv_bytes=512)
    first, second = SearchedShares(heavy, 2).shares((8192,), (0,))
    assert first > 1.5 * second
    many = SearchedShares(heavy, 2).shares((512,) * 16, (0,) * 16)
    assert second < many[1] < 0.5  # short sequences have little of it


def test_a_table_says_the_shares(tmp_path):
    table = make_table(FAST, [256, 4096], 2, model="m", hardware="h")
    table.save(tmp_path / "table.json")
    chooser = read({"table": str(tmp_path / "table.json")}).chooser(2, {}, "cpu", torch.float32, None)
    assert chooser == TableShares(table, 2)
    contexts = table.split(4096).contexts
    assert chooser.shares((4096,), (0,)) == pytest.approx([n / 4096 for n in contexts])
    assert TableShares(make_table(SLOW, [4096], 2, model="m", hardware="h"), 2).shares((4096,), (0,)) is None


def test_a_table_with_fewer_contexts_than_ranks_is_searched():
    table = make_table(FAST, [4096], 2, model="m", hardware="h")
    assert len(TableShares(replaced(table, engines=3), 3).shares((4096,), (0,))) == 3


def replaced(table, **changes):
    from dataclasses import replace

    return replace(table, **changes)


@pytest.mark.parametrize(
    "section, says",
    [
        ({"splits": [0.5, 0.5]}, "splits"),
        ({"split": [1.0]}, "two or more"),
        ({"split": [0.5, -1]}, "above 0"),
        ({"split": "even"}, "two or more"),
        ({"split": [0.5, 0.5], "table": "t.json"}, "at most one"),
        ({"timeout": -1}, "timeout"),
        ({"least": "many"}, "least"),
    ],
)
def test_sections_without_meaning(section, says):
    with pytest.raises(ValueError, match=says):
        read(section)


def test_settings_for_another_number_of_ranks(tmp_path):
    with pytest.raises(ValueError, match="for 3 ranks"):
        read({"split": [1, 1, 1]}).check(2)
    with pytest.raises(ValueError, match="3 engines"):
        TableShares(make_table(FAST, [64], 3, model="m", hardware="h"), 2)

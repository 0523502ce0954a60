"""Batches one after the other: what is expected is asked of each layer, and tried beside stock's way."""

import time

import pytest
import torch
import torch.distributed as dist

from forerun.moe.alternation import Alternation
from forerun.moe.choice import Choice, Rates
from forerun.moe.foresight import Foresight
from forerun.moe.imbalance import ExpertTimes, Ledger
from forerun.moe.pieces import Pieces
from forerun.moe.sglang_batches import Batches
from forerun.moe.sglang_spread import Ranks, Spread

# Spreading gains from 41 tokens on, if less than a row of each leaves.
RATES = Rates(summed=(10e-6, 2e-6), spread=(50e-6, 1e-6, 1e-6))


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(expected, turns=0):
    """Two layers, whose tokens send so many rows."""
    ranks = Ranks(None, 0, 1, False, False, Foresight(None, range(1)), Pieces())
    layers = [Spread(ranks, at, 8, None, Choice(RATES, rows)) for at, rows in enumerate(expected)]
    trial = Alternation(turns, None, "spread", "stock") if turns else None
    return Batches(ranks, layers, torch.device("cpu"), trial)


def ran(batches, tokens, slow=None):
    """Which layers were spread in a batch; one whose layers are spread, or are not, takes longer."""
    chosen = []

    def forward():
        chosen.extend(layer.chosen for layer in batches.layers)
        time.sleep(0.02 if any(chosen) is slow else 0)
        return "answer"

    assert batches.run(tokens, None, forward) == "answer"
    assert not any(layer.chosen for layer in batches.layers)
    return chosen


def test_each_layer_goes_the_way_that_it_is_expected_to_gain_by():
    batches = made([0.1, 1.5])
    assert [ran(batches, tokens) for tokens in (4096, 8, 0)] == [[True, False], [False, False], [False, False]]


@pytest.mark.parametrize("slow", [True, False], ids=["spread is slow", "stock is slow"])
def test_what_is_expected_is_tried(slow):
    batches = made([0.1, 0.1], turns=2)
    seen = [any(ran(batches, 4096, slow)) for _ in range(10)]
    assert seen == [True, False] * 3 + [not slow] * 4
    assert not any(ran(batches, 8, slow)[0] for _ in range(10))  # what is not expected to gain is not tried
    (told,) = batches.trial.state()
    assert told.endswith(f"{'stock' if slow else 'spread'} is kept")


def test_a_batch_that_fails_leaves_nothing_chosen():
    batches = made([0.1], turns=2)

    def fails():
        batches.layers[0].begin(4096, 4096, 16)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        batches.run(4096, None, fails)
    assert (batches.layers[0].chosen, batches.layers[0].under_way) == (False, False)
    assert ran(batches, 4096) == [True]


@pytest.mark.parametrize(("ids", "each", "known"), [(8, [8], [8]), (0, [0], [0]), (16, [8], ()), (None, [8], ())])
def test_tokens_of_a_rank_are_those_of_its_ids_or_not_known(ids, each, known):
    batches, seen = made([0.1]), []
    batches.run(8, None if ids is None else torch.zeros(ids), lambda: seen.append(batches.ranks.each), each)
    assert seen == [known]


def test_what_lies_between_batches_is_called_before_each():
    batches, called = made([0.1]), []
    batches.between = lambda: called.append(len(called))
    ran(batches, 8)
    ran(batches, 4096)
    assert called == [0, 1]


@pytest.mark.parametrize("tokens", [8, 4096])
@pytest.mark.parametrize("first", [True, False], ids=["one rank computes", "both do"])
def test_a_plan_is_given_up_once_it_costs_more_than_it_saves(tokens, first):
    """In order experts 0 to 3 are on the first of two ranks; the plan has 0 and 4 there."""
    batches, given_up = made([0.1, 1.5]), []
    for layer in batches.layers:
        layer.choice.unplanned = 1.5
    place = torch.tensor([[0, 4, 2, 6, 1, 5, 3, 7]] * 2)
    spent = 1.0 if tokens == 8 else 1e-9  # s of each row: beside what a large batch saves, nothing
    batches.ledger = Ledger(ExpertTimes((1, 2), (spent, 2 * spent), (0.0, 0.0)), place, 2, batches=2)
    batches.useless = lambda: given_up.append(batches.ledger.state())
    asked = torch.tensor([tokens, 0, 0, 0, tokens, 0, 0, 0] if first else [tokens, tokens, 0, 0, 0, 0, 0, 0])

    def forward():
        assert batches.ranks.counting
        for layer in batches.layers:
            layer.asked = asked
            assert layer.chosen == (layer.layer == 0 and tokens == 4096)

    for _ in range(2):
        batches.run(tokens, None, forward)
        assert not batches.ranks.counting
    cost = 2 * 2 * tokens * spent * (1 if first else -1)
    saved = 2 * RATES.saves(4096, 409.6) if tokens == 4096 else 0.0  # of the first layer; neither is spread without it
    told = {"batches": 2, "saved": pytest.approx(saved), "cost": pytest.approx(cost)}
    assert batches.ledger.state() == told
    assert len(given_up) == (tokens == 8 and first)


@pytest.mark.parametrize("slow", [True, False], ids=["spread is slow", "stock is slow"])
def test_a_way_that_is_not_kept_saves_nothing(slow):
    """The plan depends on it, and is answered about in the batch that decides."""
    batches, given_up = made([0.1, 0.1], turns=2), []
    for layer in batches.layers:
        layer.choice.unplanned = 0.5
    place, cost = torch.tensor([[0, 4, 2, 6, 1, 5, 3, 7]] * 2), ExpertTimes((1, 2), (1e-9, 2e-9), (1e-9, 2e-9))
    batches.ledger = Ledger(cost, place, 2, shown=batches.shown, batches=2)
    batches.useless = lambda: given_up.append(batches.trial.kept(4096))
    each = 2 * (RATES.saves(4096, 409.6) - RATES.saves(4096, 2048))
    for batch in range(8):
        for layer in batches.layers:
            layer.asked = torch.tensor([9, 0, 0, 0, 9, 0, 0, 0])  # on one of two ranks by the plan
        ran(batches, 4096, slow)
        decided = batch >= 5
        assert (batches.trial.kept(4096) is not None) == decided
        refuted = slow and decided
        counted = batches.ledger.state()
        assert counted["saved"] == pytest.approx(0.0 if refuted else counted["batches"] * each)
        assert given_up == [False] * refuted

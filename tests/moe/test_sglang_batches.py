"""Batches one after the other: what is expected is asked of each layer, and tried beside stock's way."""

import time

import pytest
import torch
import torch.distributed as dist

from forerun.moe.alternation import Alternation
from forerun.moe.choice import Choice, Rates
from forerun.moe.foresight import Foresight
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


def test_what_lies_between_batches_is_called_before_each():
    batches, called = made([0.1]), []
    batches.between = lambda: called.append(len(called))
    ran(batches, 8)
    ran(batches, 4096)
    assert called == [0, 1]

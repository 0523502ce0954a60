"""Two ways by turns, and the sooner one from then on, for each size of batches."""

import time

import pytest
import torch
import torch.distributed as dist

from forerun.moe.alternation import Alternation

CPU = torch.device("cpu")
SLOW = 0.02  # seconds


@pytest.fixture(autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ran(trial, tokens, batches, slow):
    """Which way each batch went; the one that is named takes longer."""
    ways = []
    for _ in range(batches):
        ours = trial.begin(tokens, CPU)
        time.sleep(SLOW if ours == slow else 0)
        trial.end(tokens)
        ways.append(ours)
    return ways


@pytest.mark.parametrize("slow", [True, False], ids=["ours is slow", "the other is slow"])
def test_the_sooner_way_is_kept(slow, caplog):
    trial = Alternation(2, way="tokens shuffled", other="in their order")
    with caplog.at_level("INFO"):
        assert ran(trial, 5, 12, slow) == [True, False] * 3 + [not slow] * 6
    (record,) = caplog.records
    kept = "in their order" if slow else "tokens shuffled"
    assert "batches of 4 to 7 tokens" in record.message and record.message.endswith(f"{kept} is kept")


def test_each_size_is_decided_for_itself():
    trial = Alternation(1)
    assert ran(trial, 1, 8, slow=True)[4:] == [False] * 4
    assert ran(trial, 100, 8, slow=False) == [True, False] * 2 + [True] * 4
    assert ran(trial, 120, 2, slow=True) == [True] * 2  # as batches of 100
    assert ran(trial, 0, 1, slow=True) == [True]


def test_what_the_first_batch_of_a_way_took_does_not_count():
    trial = Alternation(1)
    assert trial.begin(4, CPU)
    time.sleep(10 * SLOW)
    trial.end(4)
    assert ran(trial, 4, 6, slow=False)[3:] == [True] * 3


def test_a_batch_that_did_not_end_is_forgotten():
    trial = Alternation(1)
    trial.begin(4, CPU)  # an error in the middle of it
    assert ran(trial, 4, 6, slow=True) == [True, False, True, False, False, False]
    trial.end(4)  # none runs


def test_a_clear_difference_is_decided_early_and_a_small_one_is_not():
    trial = Alternation(20)
    assert ran(trial, 4, 10, slow=True) == [True, False] * 4 + [False] * 2
    alike = Alternation(20)
    ways = []
    for _ in range(12):
        ways.append(alike.begin(4, CPU))
        time.sleep(SLOW)
        alike.end(4)
    assert ways == [True, False] * 6


def test_one_batch_that_took_long_decides_nothing():
    trial = Alternation(3)
    for batch in range(8):
        ours = trial.begin(4, CPU)
        time.sleep(10 * SLOW if batch == 4 else 0 if ours else SLOW)
        trial.end(4)
    assert trial.begin(4, CPU)


def test_batches_of_more_tokens_by_chance_do_not_make_a_way_slower():
    trial = Alternation(3)
    for tokens in (4, 4, 7, 4, 7, 4, 4, 7):  # ours takes 0.8 of the other's time, and has longer batches
        each = (0.8 if trial.begin(tokens, CPU) else 1) * SLOW
        time.sleep(each * tokens)
        trial.end(tokens)
    assert trial.begin(4, CPU)


@pytest.mark.parametrize("steady", [True, False])
def test_what_may_be_chance_is_not_taken_for_a_gain(steady):
    trial, ours = Alternation(4), iter([1.4] * 5 if steady else [1.4, 1.5, 0.2, 2.6, 1.3])
    for _ in range(10):
        time.sleep(SLOW * (next(ours) if trial.begin(4, CPU) else 1.6))
        trial.end(4)
    assert trial.kept(4) is steady


def test_what_was_decided_is_tried_again():
    trial = Alternation(1, again=10, way="spread", other="stock")
    assert trial.state() == []
    assert ran(trial, 4, 3, slow=True) == [True, False, True]
    assert trial.state() == ["4 to 7 tokens: spread and stock by turns, 3 batches so far"]
    assert ran(trial, 4, 1, slow=True) == [False]
    (told,) = trial.state()
    assert told.startswith("4 to 7 tokens: spread ") and told.endswith(" stock is kept")
    assert ran(trial, 4, 6, slow=True) == [False] * 6
    assert ran(trial, 4, 6, slow=False) == [True, False] * 2 + [True] * 2

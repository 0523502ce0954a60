"""What a plan costs by its ranks' imbalance, batch by batch, beside what it saves."""

import time

import pytest
import torch
import torch.distributed as dist
from processes import ran

from forerun.moe.imbalance import ExpertTimes, Ledger, measure


def lines(alone, together):
    """Times by lines: for each expert that is asked at all, and for each row."""
    return ExpertTimes((1, 3), *([each + row, each + 3 * row] for each, row in (alone, together)))


TIMES = lines(alone=(1.0, 0.5), together=(1.5, 1.0))
IN_ORDER = torch.arange(4).expand(1, 4)
CROSSED = torch.tensor([[0, 2, 1, 3]])  # experts 0 and 2 on the first of two ranks


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("pairs", "in_order", "crossed"),
    [
        # On two ranks at once it takes longer than half of it on one.
        ([8, 8, 0, 0], 2 * 1.0 + 16 * 0.5, (2 * 1.5 + 16 * 1.0) / 2),
        ([8, 0, 8, 0], (2 * 1.5 + 16 * 1.0) / 2, 2 * 1.0 + 16 * 0.5),
        ([8, 0, 0, 0], 1.0 + 8 * 0.5, 1.0 + 8 * 0.5),
        ([0, 0, 0, 0], 0.0, 0.0),
    ],
)
def test_a_layer_takes_as_long_as_its_busiest_rank_or_all_at_once(pairs, in_order, crossed):
    told = torch.tensor([pairs])
    assert TIMES.seconds(told, IN_ORDER, 2).tolist() == [in_order]
    assert TIMES.seconds(told, CROSSED, 2).tolist() == [crossed]


def seen(ledger, pairs, saved, tokens=8):
    """The answer after a batch."""
    ledger.saw(torch.tensor([pairs]), tokens, saved)
    return ledger.worth()


def test_ranks_that_share_a_core_take_the_sum():
    times = lines(alone=(1.0, 0.5), together=(3.0, 1.5))  # three of them: three times as long
    pairs, place = torch.tensor([[8, 0, 2, 1, 0, 4]]), torch.arange(6).expand(1, 6)
    assert times.seconds(pairs, place, 3).tolist() == [4 * 1.0 + 15 * 0.5]


@pytest.mark.parametrize(("pairs", "worth"), [([8, 8, 0, 0], True), ([8, 0, 8, 0], False)])
def test_what_is_not_worth_its_imbalance_is_told(group, pairs, worth):
    ledger = Ledger(TIMES, CROSSED, 2, batches=3)
    assert [seen(ledger, pairs, 0.1) for _ in range(3)] == [None, None, worth]
    least, most = sorted((2 * 1.0 + 16 * 0.5, (2 * 1.5 + 16 * 1.0) / 2))
    cost = 3 * (least - most if worth else most - least)
    assert ledger.state() == {"batches": 3, "saved": pytest.approx(0.3), "cost": pytest.approx(cost)}


def test_what_saves_more_than_it_costs_is_kept_and_looked_at_again(group):
    ledger = Ledger(TIMES, CROSSED, 2, batches=2)
    assert [ledger.counts() for _ in range(4)] == [True] * 4
    costs = [8, 0, 8, 0]
    assert [seen(ledger, costs, 10.0), seen(ledger, costs, 0.0)] == [None, True]
    assert [ledger.counts() for _ in range(32)].count(True) == 2  # one of sixteen from then on
    assert [seen(ledger, costs, 0.0), seen(ledger, costs, 0.0)] == [None, False]  # what was saved before is spent


@pytest.mark.parametrize("shown", [True, False])
def test_what_depends_on_savings_that_are_not_shown_yet_is_answered_once_they_are(group, shown):
    known = {8: None}
    ledger = Ledger(TIMES, CROSSED, 2, shown=known.get, batches=2)
    costs = [8, 0, 8, 0]
    assert [seen(ledger, costs, 10.0), seen(ledger, costs, 0.0)] == [None, None]
    assert ledger.state()["saved"] == 10.0
    known[8] = shown
    assert ledger.worth() is shown
    assert ledger.state()["saved"] == (10.0 if shown else 0.0)


def test_what_would_not_be_enough_if_it_was_shown_is_not_waited_for(group):
    ledger = Ledger(TIMES, CROSSED, 2, shown=lambda tokens: None, batches=1)
    assert seen(ledger, [8, 0, 8, 0], 0.1) is False
    enough = Ledger(TIMES, CROSSED, 2, shown=lambda tokens: None if tokens == 8 else True, batches=2)
    assert [seen(enough, [8, 0, 8, 0], 0.1), seen(enough, [8, 0, 8, 0], 10.0, tokens=9)] == [None, True]


def test_a_few_rows_may_take_as_long_as_many():
    times = ExpertTimes((1, 2, 4, 16), (1.0, 3.0, 4.0, 10.0), (1.0, 3.0, 4.0, 10.0))
    found = [
        float(times.seconds(torch.tensor([[rows, 0]]), torch.tensor([[0, 1]]), 2)) for rows in (0, 1, 2, 3, 10, 20)
    ]
    assert found == [0.0, 1.0, 3.0, 3.5, 7.0, 12.0]


def test_experts_are_timed_alone_and_together(group):
    times = measure(lambda rows: time.sleep(4 * (0.002 + 0.001 * rows)), 4)
    for told in (times.alone, times.together):
        for rows, spent in zip(times.rows, told, strict=True):
            assert 0.0019 + 0.001 * rows < spent < 0.01 + 0.0015 * rows


def test_ranks_answer_alike(tmp_path):
    codes, outputs = ran("imbalance_program.py", 2, [str(tmp_path / "store"), "{rank}"], 200)
    assert codes == [0, 0], "\n".join(outputs)[-3000:]
    assert len(set(outputs)) == 1

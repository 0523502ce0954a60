"""Experts on ranks: known answers, exactness, limits."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import planted, real_profile

from forerun.moe.balance import balance
from forerun.moe.coarsen import coarsened
from forerun.moe.exact import best_of_all, placements
from forerun.moe.grouping import contiguous, group
from forerun.moe.homes import homes
from forerun.moe.local_search import descend
from forerun.moe.predict import fit
from forerun.moe.task import Limits, Task, nearness

FREE = Limits(experts=64.0, tokens=np.inf)


def random_counts(seed, tokens=60, experts=8):
    random = np.random.default_rng(seed)
    return (random.gamma(0.3, size=(tokens, experts)) * 20 * random.pareto(1.5, (tokens, 1))).astype(np.float32) + 0.01


def assert_even(rank, ranks):
    assert np.bincount(rank, minlength=ranks).tolist() == [len(rank) // ranks] * ranks


@pytest.mark.parametrize(("spread", "local"), [(0.2, 0.825), (0.0, 1.0), (0.5, 0.5625)])
def test_planted_blocks_are_found(spread, local):
    found = group(Task(planted(spread), nearness(8), 8), effort=12)
    assert found.rating.local == pytest.approx(local, abs=1e-6)
    assert found.rating.experts == pytest.approx(1.0, abs=1e-6)
    assert found.rating.tokens == pytest.approx(1.0)
    assert found.within_limits


@pytest.mark.parametrize("seed", range(6))
def test_few_experts_are_placed_best(seed):
    """Against every placement and, without a limit on tokens, every token at its best rank."""
    counts = random_counts(seed, experts=6)
    task = Task(counts, nearness(3), 2, FREE)
    best = 0.0
    for order in itertools.permutations(range(6)):
        rank = np.argsort(order) // 2
        best = max(best, sum(max(row[rank == r].sum() for r in range(3)) for row in counts))
    found = group(task)
    assert found.exact
    assert found.rating.local * counts.sum() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_limits_bound_the_exact_placement_and_the_search(seed):
    task = Task(random_counts(seed, tokens=300), nearness(2), 2, Limits(1.05, 1.05))
    exact = best_of_all(task)
    assert exact is not None
    rank, value = exact
    searched, _ = descend(task, np.array([0, 1] * 4), np.random.default_rng(0), task.expert_limit)
    for placed in (rank, searched):
        assert_even(placed, 2)
        rating = task.rate(placed)
        assert rating.tokens <= 1.05 * (1 + 1e-6)
        assert rating.local * task.counts.sum() <= value * (1 + 1e-6)
    assert task.rate(rank).experts <= 1.05 * (1 + 1e-6)
    assert value == pytest.approx(task.rate(rank).local * task.counts.sum(), rel=0.02)  # ids are not split there


def test_placements_are_counted():
    assert placements(8, 4) == 105
    assert placements(16, 2) == 6435


@pytest.mark.parametrize("layer", range(3))
def test_mixtrals_optimum(layer):
    table = real_profile("mixtral-8x7b", "wikipedia").table(layer)
    task = Task(table.counts, nearness(4), 2, FREE)
    found = group(task)
    assert found.exact
    assert round(found.rating.local, 4) == (0.4842, 0.4429, 0.4920)[layer]
    assert round(task.rate(contiguous(8, 4)).local, 4) == (0.4515, 0.4195, 0.4250)[layer]


@pytest.mark.parametrize("layer", range(3))
def test_olmoe_is_local_and_even(layer):
    """Above a plain local search; homes of another text's tokens, by its own counts and predicted."""
    wikipedia, book = (real_profile("olmoe-1b-7b", domain).table(layer) for domain in ("wikipedia", "book"))
    found = group(Task(wikipedia.counts, nearness(4), 8), effort=40)
    assert_even(found.rank, 4)
    assert found.within_limits
    assert found.rating.local > (0.43, 0.49, 0.51)[layer]
    assert found.rating.experts <= 1.25 * (1 + 1e-6)
    assert found.rating.tokens <= 1.1 * (1 + 1e-6)
    other = Task(book.counts, nearness(4), 8)
    expected = fit(wikipedia).shares(book.tokens) @ np.eye(4, dtype=np.float32)[found.rank]
    home, _ = homes(expected.T * other.occurrences, other.occurrences, other.token_limit)
    predicted = other.rate_with(found.rank, home)
    assert predicted.tokens <= 1.1 * (1 + 1e-6)
    # A fifth of the book's occurrences are of ids that the other text does not have.
    assert predicted.local > (0.33, 0.44, 0.36)[layer]
    assert other.rate(found.rank).local > (0.36, 0.44, 0.42)[layer]


def test_random_homes_are_local_by_chance():
    """Homes drawn alike from all ranks: 1/R of the pairs, within four deviations of a draw and of the draws' mean."""
    tokens, draws = 400, 100
    task = Task(random_counts(0, tokens=tokens, experts=64), nearness(8), 8, FREE)
    found = group(task, effort=2)
    # What a token adds is drawn from its pairs on each rank, by itself.
    on_rank = np.stack([task.counts[:, found.rank == rank].sum(1, dtype=np.float64) for rank in range(8)])
    deviation = np.sqrt(on_rank.var(0).sum()) / on_rank.sum()
    homes_of = np.random.default_rng(0).integers(0, 8, (draws, tokens))
    rates = [task.rate_with(found.rank, home).local for home in homes_of]
    assert np.abs(np.array(rates) - 1 / 8).max() < 4 * deviation
    assert abs(np.mean(rates) - 1 / 8) < 4 * deviation / np.sqrt(draws)
    assert found.rating.local > 1 / 8 + 4 * deviation  # chance is not all that there is to have


def test_hosts_keep_far_what_is_seldom():
    """Pairs of blocks that are used together end on one host."""
    counts = planted(0.0, experts=16, ranks=8, tokens=400)
    mate = counts @ np.zeros((16, 16), np.float32)
    block = [np.flatnonzero(counts[token]) for token in range(8)]
    for token in range(400):
        mate[token, block[(token % 8) ^ 1]] = counts[token].max() * 0.5
    task = Task(counts + mate, nearness(8, hosts=4, near=0.8), 8)
    found = group(task, effort=40)
    assert found.rating.local == pytest.approx(2 / 3, abs=1e-4)
    assert found.rating.saved == pytest.approx(2 / 3 + 0.8 / 3, abs=1e-4)


def test_an_expert_too_busy_for_the_limit_is_placed_and_said():
    counts = np.ones((50, 8), np.float32)
    counts[:, 3] = 30
    found = group(Task(counts, nearness(4), 2, Limits(1.25, 1.5)), effort=4)
    assert_even(found.rank, 4)
    assert not found.within_limits
    assert found.rating.experts == pytest.approx(31 / (37 / 4))


def test_the_same_input_gives_the_same_placement():
    task = Task(random_counts(5, tokens=500, experts=16), nearness(4), 2)
    one, other = group(task, effort=5), group(task, effort=5)
    assert np.array_equal(one.rank, other.rank)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task(np.ones((4, 6), np.float32), nearness(4), 2), "6 experts do not divide by 4 ranks"),
        (lambda: Task(np.zeros((4, 8), np.float32), nearness(4), 2), "all zero"),
        (lambda: Task(np.full((4, 8), np.nan, np.float32), nearness(4), 2), "finite"),
        (lambda: Task(np.ones((4, 8), np.float32), nearness(4), 2, Limits(0.9, 1)), "1 or more"),
        (lambda: nearness(6, 4), "6 ranks on 4 hosts"),
        (lambda: nearness(4, 2, 1.0), "near is 1.0"),
    ],
)
def test_what_cannot_be_grouped_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 300), st.integers(1, 6), st.floats(1.0, 2.0))
def test_homes_keep_to_the_limit(seed, tokens, ranks, limit):
    random = np.random.default_rng(seed)
    gain = np.round(random.random((ranks, tokens)) * 4)
    weight = np.full(tokens, 3.0)
    most = np.ceil(tokens / ranks * limit) * 3
    home, price = homes(gain, weight, most)
    assert np.bincount(home, weight, ranks).max() <= most
    if (np.bincount(gain.argmax(0), weight, ranks) <= most).all():
        assert gain[home, np.arange(tokens)].sum() == pytest.approx(gain.max(0).sum())
    assert (price >= 0).all()


def test_a_coarser_table_keeps_what_each_expert_does():
    counts = random_counts(1, tokens=5000, experts=16)
    small = coarsened(counts, frequent=200, groups=50)
    assert len(small) <= 250
    assert small.sum(0) == pytest.approx(counts.sum(0), rel=1e-4)
    assert small[:200].tolist() == counts[np.argsort(-counts.sum(1), kind="stable")[:200]].tolist()


EPLB = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


@pytest.mark.parametrize(("load", "theirs"), [(EPLB[0], 1.208), (EPLB[1], 1.242)])
def test_no_less_even_than_eplbs_example(load, theirs):
    found = balance(load, ranks=8, places=2)
    assert found.load.max() / found.load.mean() <= theirs
    assert set(found.expert.ravel().tolist()) == set(range(12))
    copies = np.bincount(found.expert.ravel())
    by_hand = [sum(load[e] / copies[e] for e in row) for row in found.expert.tolist()]
    assert found.load.tolist() == pytest.approx(by_hand)


def test_loads_that_cannot_be_balanced_are_refused():
    with pytest.raises(ValueError, match="12 experts do not fit 2 ranks of 4 places"):
        balance(EPLB[0], 2, 4)
    with pytest.raises(ValueError, match="finite"):
        balance([1, np.nan], 2, 1)

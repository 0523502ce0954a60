"""Rows and bytes: formulas, and counts equal to them."""

import numpy as np
import pytest
from tables import planted

from forerun.moe.dispatch import fan_out, rows, uniform_fan_out, volume_classic, volume_shuffled
from forerun.moe.grouping import contiguous, group
from forerun.moe.task import Task, nearness


def drawn(tokens, experts, top_k, seed=0):
    random = np.random.default_rng(seed)
    return np.argsort(random.random((tokens, experts)), axis=1)[:, :top_k]


def test_uniform_fan_out():
    assert uniform_fan_out(64, 8, 8) == pytest.approx(5.43, abs=5e-3)
    assert fan_out(drawn(20_000, 64, 8), contiguous(64, 8), 8).mean() == pytest.approx(5.43, abs=0.03)
    assert uniform_fan_out(8, 8, 8) == 8


def test_deduplication_alone():
    """2.19 times fewer rows for top 8 of 64 on 4 ranks, 1.08 for top 2 of 8: moe.md's figures."""
    for experts, top_k, ratio in ((64, 8, 2.19), (8, 2, 1.08)):
        chosen, home = drawn(40_000, experts, top_k), np.arange(40_000) % 4
        sent = rows(chosen, contiguous(experts, 4), home, 4)
        assert sent.leaving(deduplicated=False) / sent.leaving() == pytest.approx(ratio, abs=0.01)
        assert sent.leaving(deduplicated=False) == pytest.approx(40_000 * top_k * 3 / 4, rel=0.01)


def test_rows_are_what_a_loop_counts():
    chosen = drawn(50, 12, 3)
    rank, home = contiguous(12, 4), np.random.default_rng(1).integers(0, 4, 50)
    pairs, single = np.zeros((4, 4), int), np.zeros((4, 4), int)
    for token in range(50):
        for expert in chosen[token]:
            pairs[home[token], rank[expert]] += 1
        for to in {rank[expert] for expert in chosen[token]}:
            single[home[token], to] += 1
    sent = rows(chosen, rank, home, 4)
    assert sent.pairs.tolist() == pairs.tolist()
    assert sent.deduplicated.tolist() == single.tolist()
    assert sent.local_rate == pytest.approx(np.trace(pairs) / 150)


def test_planted_blocks_without_noise_send_nothing():
    counts = planted(0.0)
    found = group(Task(counts, nearness(8), 8), effort=12)
    chosen = np.argsort(-counts, axis=1, kind="stable")[:, :8]
    assert fan_out(chosen, found.rank, 8).tolist() == [1] * len(counts)
    assert rows(chosen, found.rank, found.rating.home, 8).leaving() == 0


def test_volumes():
    assert volume_classic(8, 6) == pytest.approx(8.31, abs=5e-3)
    assert volume_shuffled(8, 6, 0.875) == pytest.approx(3.06, abs=5e-3)
    assert volume_shuffled(8, 6, 0.38) == pytest.approx(2.32, abs=5e-3)


def test_counted_rows_are_the_volumes():
    """Dispatch and combine of a rank's n/G tokens, one row a pair: the formula's second term, exactly."""
    tokens, ranks, top_k = 800, 8, 6
    chosen, home = drawn(tokens, 64, top_k), np.arange(tokens) % ranks
    sent = rows(chosen, contiguous(64, ranks), home, ranks)
    counted = 2 * sent.leaving(deduplicated=False) / ranks / tokens
    assert counted == pytest.approx(volume_shuffled(ranks, top_k, 1 - sent.local_rate) - 2 * 7 / 8, abs=1e-12)


def test_no_tokens_send_nothing():
    sent = rows(np.zeros((0, 2), int), contiguous(8, 4), np.zeros(0, int), 4)
    assert (sent.leaving(), sent.local_rate) == (0, 0.0)

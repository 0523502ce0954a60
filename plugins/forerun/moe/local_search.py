"""Exchanges of two experts between two ranks, for as long as they pay.

Tokens follow at once: an exchange is rated with every token at its best rank at the ranks' present prices, all experts
of a rank as partners in one array operation. Prices are set anew after each sweep.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forerun.moe.homes import homes
from forerun.moe.task import Task

__all__ = ["descend"]

_WORTH = 1e-6  # of the value: less is rounding
_SWEEPS = 20


def descend(
    task: Task, rank: NDArray[np.int64], random: np.random.Generator, limit: float
) -> tuple[NDArray[np.int64], float]:
    """A placement that no exchange was found to better.

    Args:
        task: What is grouped.
        rank: `[E]` where to start.
        random: The order in which experts are tried.
        limit: Most load of a rank's experts; ranks that are above it do not get more.

    Returns:
        `[E]` the placement, and its pairs saved.
    """
    tokens = np.arange(len(task.counts))
    gain = task.gain(rank)
    home, price = homes(gain, task.occurrences, task.token_limit)
    best, value = rank, float(gain[home, tokens].sum(dtype=np.float64))
    for _ in range(_SWEEPS):
        trial = best.copy()
        net = (gain - np.multiply.outer(price, task.occurrences)).astype(np.float32)
        if not _sweep(task, trial, net, random, limit):
            break
        gain = task.gain(trial)
        home, price = homes(gain, task.occurrences, task.token_limit)
        found = float(gain[home, tokens].sum(dtype=np.float64))
        if found <= value * (1 + _WORTH):
            break
        best, value = trial, found
    return best, value


def _sweep(
    task: Task, rank: NDArray[np.int64], net: NDArray[np.float32], random: np.random.Generator, limit: float
) -> int:
    """Tries each expert once, exchanges it for its best partner; `rank` and `net` are changed. How many were."""
    load = np.bincount(rank, task.load, task.ranks)
    exchanged = 0
    for one in random.permutation(task.experts):
        here = rank[one]
        value = net.max(0).sum() * np.float32(1 + _WORTH)
        partner = -1
        for there in range(task.ranks):
            if there == here:
                continue
            more = task.load - task.load[one]  # load that comes to `here`
            fits = (load[here] + more <= max(limit, load[here])) & (load[there] - more <= max(limit, load[there]))
            others = np.flatnonzero((rank == there) & fits)
            if not len(others):
                continue
            values = _values(task, net, one, others, here, there)
            top = int(values.argmax())
            if values[top] > value:
                value, partner = values[top], int(others[top])
        if partner >= 0:
            there = rank[partner]
            share = task.nearness[:, here] - task.nearness[:, there]
            net += share[:, None] * (task.by_expert[partner] - task.by_expert[one])
            more = task.load[partner] - task.load[one]
            load[here] += more
            load[there] -= more
            rank[one], rank[partner] = there, here
            exchanged += 1
    return exchanged


def _values(
    task: Task, net: NDArray[np.float32], one: int, others: NDArray[np.int64], here: int, there: int
) -> NDArray[np.float32]:
    """The value after `one`, which is here, was exchanged for each of `others`, which are there."""
    share = task.nearness[:, here] - task.nearness[:, there]
    change = task.by_expert[others] - task.by_expert[one]
    same = share == 0
    best: NDArray[np.float32] | None = np.broadcast_to(net[same].max(0), change.shape).copy() if same.any() else None
    for rank in np.flatnonzero(~same):
        changed = net[rank] + share[rank] * change
        best = changed if best is None else np.maximum(best, changed, out=best)
    assert best is not None
    return np.asarray(best.sum(1))

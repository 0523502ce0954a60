"""The rank that each token id is at home on: where most of its experts are, as far as ranks have room.

Ranks that too many tokens prefer get a price, raised until just enough of them go elsewhere: those that lose least.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["homes"]

_ROUNDS = 200  # of raising prices; what is still over is moved token by token
_JITTER = 1e-5  # of an occurrence: equal tokens do not all leave at once


def homes(gain: NDArray[Any], occurrences: NDArray[Any], limit: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Homes of large total gain, no rank with more occurrences than the limit.

    Plain equivalent without a limit: `gain.argmax(0)`. Where no way was found to keep to it (a token id is not split),
    ranks are as little above as was found.

    Args:
        gain: `[R, N]` what it saves to have token id n on rank r.
        occurrences: `[N]` how often each occurs.
        limit: Most occurrences of a rank.

    Returns:
        `[N]` the homes, and `[R]` the prices of an occurrence.

    Source: Bertsekas, The auction algorithm, 1988 (prices raised to the bidders' margin).
    """
    ranks, tokens = gain.shape
    weight = np.asarray(occurrences, np.float64)
    price = np.zeros(ranks)
    if not np.isfinite(limit) or not tokens:
        return gain.argmax(0), price
    jitter = np.random.default_rng(0).random((ranks, tokens)) * weight * _JITTER
    value = gain + jitter
    home = value.argmax(0)
    load = np.bincount(home, weight, ranks)
    for _ in range(_ROUNDS):
        rank = int(load.argmax())
        if load[rank] <= limit:
            return home, price
        there = np.flatnonzero(home == rank)
        others = value[:, there]
        others[rank] = -np.inf
        margin = (value[rank, there] - others.max(0)) / weight[there]
        order = margin.argsort()
        gone = np.cumsum(weight[there[order]])
        last = min(int(np.searchsorted(gone, load[rank] - limit)), len(order) - 1)
        rise = margin[order[last]] + 1e-9
        price[rank] += rise
        value[rank] -= rise * weight
        home = value.argmax(0)
        load = np.bincount(home, weight, ranks)
    _unload(home, gain, weight, limit)
    return home, price


def _unload(home: NDArray[np.int64], gain: NDArray[Any], weight: NDArray[np.float64], limit: float) -> None:
    """Moves tokens from ranks over the limit to where there is room, those that lose least first."""
    ranks = len(gain)
    load = np.bincount(home, weight, ranks)
    for rank in np.argsort(-load):
        if load[rank] <= limit:
            continue
        there = np.flatnonzero(home == rank)
        loss = (gain[rank, there] - gain[:, there].max(0, initial=-np.inf, where=_but(rank, ranks))) / weight[there]
        for token in there[loss.argsort()]:
            fits = load + weight[token] <= limit
            if load[rank] <= limit:
                break
            if fits.any():
                to = int(np.where(fits, gain[:, token], -np.inf).argmax())
                home[token] = to
                load[rank] -= weight[token]
                load[to] += weight[token]


def _but(rank: int, ranks: int) -> NDArray[np.bool_]:
    return np.asarray(np.arange(ranks) != rank)[:, None]

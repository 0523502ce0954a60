"""Experts copied and packed so that ranks compute alike, wherever tokens are: what EPLB does, searched jointly.

More places than experts: the busiest are there several times and share their load. Copies and places are chosen
together: after EPLB's own first answer (copies by load, then packing), places are exchanged and copies given from
expert to expert as long as the fullest rank gets emptier.

Source: DeepSeek's EPLB (expert-parallelism load balancer).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Balance", "balance"]

_ROUNDS = 60  # of shaking


class Balance(NamedTuple):
    """Copies of experts on ranks."""

    expert: NDArray[np.int64]  # [R, places] which expert's copy lies there
    load: NDArray[np.float64]  # [R]


def balance(load: ArrayLike, ranks: int, places: int, seed: int = 0) -> Balance:
    """Copies and their places, the fullest rank as empty as was found.

    Args:
        load: `[E]` of each expert; its copies share it evenly.
        ranks: R.
        places: Copies of a rank; R times as many are E or more.
        seed: Of the search.

    Raises:
        ValueError: The experts do not fit, or a load is negative or not finite.
    """
    weight = np.asarray(load, np.float64)
    if weight.ndim != 1 or not len(weight) or not np.isfinite(weight).all() or (weight < 0).any():
        raise ValueError(f"loads {list(weight.shape)} must be [E], finite and not negative")
    if ranks < 1 or ranks * places < len(weight):
        raise ValueError(f"{len(weight)} experts do not fit {ranks} ranks of {places} places")
    random = np.random.default_rng(seed)
    copies = np.ones(len(weight), np.int64)
    for _ in range(ranks * places - len(weight)):
        copies[(weight / copies).argmax()] += 1
    best = _settled(_packed(weight, copies, ranks, places), weight, ranks)
    for _ in range(_ROUNDS):
        trial = best.copy()
        one, other = random.integers(0, trial.size, (2, 2))
        trial.ravel()[[*one]] = trial.ravel()[[*one[::-1]]]
        if (trial == trial.ravel()[other[0]]).sum() > 1:
            trial.ravel()[other[0]] = trial.ravel()[other[1]]
        trial = _settled(trial, weight, ranks)
        if _loads(trial, weight).max() <= _loads(best, weight).max():
            best = trial
    return Balance(best, _loads(best, weight))


def _loads(expert: NDArray[np.int64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    copies = np.bincount(expert.ravel(), minlength=len(weight))
    return np.asarray((weight / np.maximum(copies, 1))[expert].sum(1))


def _packed(weight: NDArray[np.float64], copies: NDArray[np.int64], ranks: int, places: int) -> NDArray[np.int64]:
    every = np.repeat(np.arange(len(weight)), copies)
    expert, load, filled = np.zeros((ranks, places), np.int64), np.zeros(ranks), np.zeros(ranks, np.int64)
    for one in every[np.argsort(-(weight / copies)[every], kind="stable")]:
        rank = int(np.where(filled < places, load, np.inf).argmin())
        expert[rank, filled[rank]] = one
        load[rank] += weight[one] / copies[one]
        filled[rank] += 1
    return expert


def _settled(expert: NDArray[np.int64], weight: NDArray[np.float64], ranks: int) -> NDArray[np.int64]:
    """Exchanges of two places, and copies given to another expert, until none makes the fullest rank emptier."""
    best, most = expert.copy(), _rated(expert, weight)
    moved = True
    while moved:
        moved = False
        full = int(_loads(best, weight).argmax())
        for place in range(best.shape[1]):
            for trial in (*_exchanges(best, full, place), *_gifts(best, full, place, len(weight))):
                rated = _rated(trial, weight)
                if rated < most:
                    best, most, moved = trial, rated, True
            if moved:
                break
    return best


def _rated(expert: NDArray[np.int64], weight: NDArray[np.float64]) -> tuple[float, float]:
    load = _loads(expert, weight)
    return round(float(load.max()), 9), round(float((load**2).sum()), 6)


def _exchanges(expert: NDArray[np.int64], rank: int, place: int) -> list[NDArray[np.int64]]:
    found = []
    for other in range(len(expert)):
        for there in range(expert.shape[1]):
            if other != rank and expert[other, there] != expert[rank, place]:
                trial = expert.copy()
                trial[rank, place], trial[other, there] = expert[other, there], expert[rank, place]
                found.append(trial)
    return found


def _gifts(expert: NDArray[np.int64], rank: int, place: int, experts: int) -> list[NDArray[np.int64]]:
    """Any place whose expert has other copies becomes a copy of the full rank's expert, or of another one there."""
    found = []
    copies = np.bincount(expert.ravel(), minlength=experts)
    for at in np.flatnonzero(copies[expert.ravel()] > 1):
        if expert.ravel()[at] != expert[rank, place]:
            trial = expert.copy()
            trial.ravel()[at] = expert[rank, place]
            found.append(trial)
    if copies[expert[rank, place]] > 1:
        for one in range(experts):
            trial = expert.copy()
            trial[rank, place] = one
            found.append(trial)
    return found

"""What the ranks of a token's last two layers say of the next one.

A token is on the rank of most of its experts, layer by layer: its *device sequence*. What its id predicts is weighted
by how much more often, after the same two ranks, experts were on each rank.

Source: Speculative MoE, arXiv 2503.04398 (device-sequence look-back of 2 layers).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Lookback", "dominant", "fit_lookback", "pairs_by_rank"]

_WEIGHTS = np.linspace(0, 1.5, 16)
_PRIOR = 4.0  # occurrences that the layer's mean counts as


@dataclass(frozen=True, eq=False)
class Lookback:
    """One layer's look-back.

    Args:
        ratio: `[R, R, R]` after the ranks two layers and one layer before: a rank's share over its mean share.
        weight: How much it is believed: the exponent; 0: not at all.
    """

    ratio: NDArray[np.float32]
    weight: float

    def adjusted(
        self, share: NDArray[np.float32], before: NDArray[np.int64], last: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """`[n, R]` shares, given the token's ranks.

        Args:
            share: `[n, R]` by the token's id.
            before: `[n]` its rank two layers before.
            last: `[n]` its rank in the layer before.
        """
        weighted = share * self.ratio[before, last] ** np.float32(self.weight)
        return np.asarray(weighted / weighted.sum(1, keepdims=True), np.float32)


def pairs_by_rank(experts: NDArray[np.int16], rank: NDArray[np.int64], ranks: int) -> NDArray[np.float32]:
    """`[n, R]` how many of each token's experts (`[n, k]`) are on each rank, experts placed as given (`[E]`)."""
    pairs = np.zeros((len(experts), ranks), np.float32)
    np.add.at(pairs, (np.arange(len(experts))[:, None], rank[experts]), 1)
    return pairs


def dominant(pairs: NDArray[np.float32]) -> NDArray[np.int64]:
    """`[n]` the rank of most of a token's experts; the first of equals."""
    return np.asarray(pairs.argmax(1))


def fit_lookback(
    share: NDArray[np.float32], before: NDArray[np.int64], last: NDArray[np.int64], pairs: NDArray[np.float32]
) -> Lookback:
    """The look-back of a layer, from paths.

    Args:
        share: `[n, R]` by the token's id, of which this very occurrence was left out.
        before: `[n]` the rank two layers before.
        last: `[n]` the rank in the layer before.
        pairs: `[n, R]` the experts that came.

    The weight is chosen on the half of the paths that the ratios were not counted on; the ratios are then all paths'.
    """
    half = len(share) // 2
    trial = _ratio(before[:half], last[:half], pairs[:half])

    def hits(weight: float) -> float:
        adjusted = Lookback(trial, weight).adjusted(share[half:], before[half:], last[half:])
        return float(pairs[half:][np.arange(len(share) - half), adjusted.argmax(1)].sum())

    best = max(_WEIGHTS, key=hits) if half else 0.0
    return Lookback(_ratio(before, last, pairs), float(best))


def _ratio(before: NDArray[np.int64], last: NDArray[np.int64], pairs: NDArray[np.float32]) -> NDArray[np.float32]:
    ranks = pairs.shape[1]
    sums = np.zeros((ranks, ranks, ranks))
    np.add.at(sums, (before, last), pairs)
    mean = (pairs.sum(0) + 1) / (pairs.sum() + ranks)
    top_k = pairs.sum() / max(len(pairs), 1)
    sums += _PRIOR * top_k * mean
    return np.asarray(sums / np.maximum(sums.sum(2, keepdims=True), 1e-9) / mean, np.float32)

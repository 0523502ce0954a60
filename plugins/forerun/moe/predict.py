"""Where a token's experts will be, before it is routed: by its id, and by the ranks of its last layers.

An id that was seen often answers by its own counts, a rare one leans on the prior, one never seen takes an embedding
neighbour's answer if there are embeddings, else the prior. How much a count weighs against the prior is fitted: by the
likelihood of each occurrence given all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from forerun.moe.profile import Table

__all__ = ["Calibration", "Predictor", "calibration", "fit"]

_SAMPLE = 200_000  # counts that the smoothing is fitted to
_BLOCK = 4096  # ids that are compared with all others at once


@dataclass(frozen=True, eq=False)
class Predictor:
    """One layer's expectation.

    Args:
        table: The counts.
        prior: `[E]` shares of an id of which nothing is known.
        strength: Pairs that the prior counts as.
    """

    table: Table
    prior: NDArray[np.float32]
    strength: float

    def shares(self, ids: NDArray[np.int64], embeddings: NDArray[Any] | None = None) -> NDArray[np.float32]:
        """`[n, E]` what share of each id's pairs goes to each expert.

        Args:
            ids: `[n]`.
            embeddings: `[V, H]` of all ids: what was never seen answers as the nearest one that was.
        """
        tokens = self.table.tokens
        row = np.minimum(np.searchsorted(tokens, ids), len(tokens) - 1)
        known = tokens[row] == ids
        if embeddings is not None and not known.all():
            row[~known] = _nearest(embeddings, ids[~known], tokens)
            known[:] = True
        counts = self.table.counts[row] * known[:, None]
        return self.smoothed(counts)

    def smoothed(self, counts: NDArray[np.float32]) -> NDArray[np.float32]:
        """`[n, E]` shares of ids with these counts (`[n, E]`)."""
        pairs = counts.sum(1, keepdims=True)
        return np.asarray((counts + self.strength * self.prior) / (pairs + self.strength), np.float32)


def fit(table: Table) -> Predictor:
    """The predictor of a layer.

    The prior is the mean of the ids' own shares, each id counted once: what was never seen is like what is rare.
    """
    counts = table.counts
    pairs = counts.sum(1, keepdims=True)
    prior = (counts / pairs).mean(0) + 1e-6
    prior = (prior / prior.sum()).astype(np.float32)
    row, expert = np.nonzero(counts)
    if len(row) > _SAMPLE:
        chosen = np.random.default_rng(0).choice(len(row), _SAMPLE, replace=False)
        row, expert = row[chosen], expert[chosen]
    count, others, expected = counts[row, expert], pairs[row, 0] - 1, prior[expert]

    def surprise(log_strength: float) -> float:
        strength = np.exp(log_strength)
        left_out = (count - 1 + strength * expected) / (others + strength)
        return -float((count * np.log(left_out)).sum())

    found = minimize_scalar(surprise, bounds=(np.log(1e-2), np.log(1e4)), method="bounded")
    return Predictor(table, prior, float(np.exp(found.x)))


class Calibration(NamedTuple):
    """Whether shares that were predicted came true, in bins of equal width."""

    predicted: NDArray[np.float64]  # [bins] mean prediction; NaN: none fell there
    actual: NDArray[np.float64]  # [bins] what came
    pairs: NDArray[np.float64]  # [bins] how many
    error: float  # mean distance of the two, by pairs


def calibration(predicted: NDArray[Any], local: NDArray[Any], total: NDArray[Any], bins: int = 10) -> Calibration:
    """Holds predicted shares against counts.

    Args:
        predicted: `[n]` predicted share of local pairs.
        local: `[n]` pairs that were local.
        total: `[n]` all pairs.
        bins: Of [0, 1].
    """
    place = np.minimum((np.asarray(predicted) * bins).astype(int), bins - 1)
    pairs = np.bincount(place, total, bins)
    there = np.where(pairs > 0, pairs, np.nan)
    mean, actual = np.bincount(place, predicted * total, bins) / there, np.bincount(place, local, bins) / there
    error = float(np.nansum(np.abs(mean - actual) * pairs) / pairs.sum()) if pairs.sum() else 0.0
    return Calibration(mean, actual, pairs.astype(np.float64), error)


def _nearest(embeddings: NDArray[Any], ids: NDArray[np.int64], seen: NDArray[np.int64]) -> NDArray[np.intp]:
    """`[n]` for each id the place in `seen` of the one with the most similar embedding."""
    unit = np.asarray(embeddings, np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    blocks = [(unit[ids[at : at + _BLOCK]] @ unit[seen].T).argmax(1) for at in range(0, len(ids), _BLOCK)]
    return np.concatenate(blocks)

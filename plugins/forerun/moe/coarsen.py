"""A table of fewer rows to search on: the most frequent tokens as they are, the others summed with those alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["coarsened"]

_ROUNDS = 8


def coarsened(
    counts: NDArray[np.float32], frequent: int = 1200, groups: int = 300, seed: int = 0
) -> NDArray[np.float32]:
    """`[at most frequent + groups, E]`; each expert's sum stays.

    Args:
        counts: `[N, E]`.
        frequent: Rows kept as they are.
        groups: Rows that the others become, by k-means of the roots of their shares.
        seed: Of the first centres.
    """
    if len(counts) <= frequent + groups:
        return counts
    order = np.argsort(-counts.sum(1), kind="stable")
    kept, rest = counts[order[:frequent]], counts[order[frequent:]]
    rest = rest[rest.any(1)]
    shape = np.sqrt(rest / rest.sum(1, keepdims=True))  # of length 1: the nearest centre is that of the largest product
    centre = shape[np.random.default_rng(seed).choice(len(rest), groups, replace=False)]
    for _ in range(_ROUNDS):
        group = (shape @ centre.T - (centre**2).sum(1) / 2).argmax(1)
        sums = np.zeros_like(centre)
        np.add.at(sums, group, shape)
        size = np.bincount(group, minlength=groups)
        centre = np.where(size[:, None] > 0, sums / np.maximum(size, 1)[:, None], centre)
    merged = np.zeros((groups, counts.shape[1]), np.float32)
    np.add.at(merged, group, rest)
    return np.concatenate([kept, merged[merged.any(1)]])

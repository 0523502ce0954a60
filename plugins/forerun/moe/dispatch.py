"""What dispatching tokens to experts sends: destinations, rows, bytes.

Rows are hidden states. Stock DeepSpeed's AutoEP sends a row for each (token, expert) pair whose expert is elsewhere;
with *deduplicated* rows a token goes to a rank once, however many of its experts are there. The classic layer sends a
fixed capacity, wherever experts and tokens are.

Notation: G ranks (tensor-parallel and expert-parallel), k experts of a token, n tokens, h hidden size, cf capacity
factor, alpha share of pairs that leave their rank (1 - local activation rate).
"""

from __future__ import annotations

from math import comb
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rows", "fan_out", "rows", "uniform_fan_out", "volume_classic", "volume_shuffled"]


class Rows(NamedTuple):
    """Rows that one dispatch sends from each rank to each."""

    pairs: NDArray[np.int64]  # [R, R] one per (token, expert)
    deduplicated: NDArray[np.int64]  # [R, R] one per (token, rank)

    @property
    def local_rate(self) -> float:
        """Local activation rate: the share of pairs that stay on their rank."""
        return float(np.trace(self.pairs) / max(self.pairs.sum(), 1))

    def leaving(self, *, deduplicated: bool = True) -> int:
        """Rows that leave their rank; what stays is not sent."""
        sent = self.deduplicated if deduplicated else self.pairs
        return int(sent.sum() - np.trace(sent))


def _at(experts: NDArray[Any], rank: NDArray[Any], ranks: int) -> NDArray[np.int64]:
    pairs = np.zeros((len(experts), ranks), np.int64)
    np.add.at(pairs, (np.arange(len(experts))[:, None], rank[experts]), 1)
    return pairs


def fan_out(experts: NDArray[Any], rank: NDArray[Any], ranks: int) -> NDArray[np.int64]:
    """`[n]` the number of ranks that hold a token's experts.

    Args:
        experts: `[n, k]`.
        rank: `[E]` the rank of each expert.
        ranks: R.
    """
    return np.asarray((_at(experts, rank, ranks) > 0).sum(1))


def rows(experts: NDArray[Any], rank: NDArray[Any], home: NDArray[Any], ranks: int) -> Rows:
    """What a dispatch sends; the way back, combining, is the same turned round.

    Args:
        experts: `[n, k]`.
        rank: `[E]` the rank of each expert.
        home: `[n]` the rank of each token.
        ranks: R.
    """
    pairs = _at(experts, rank, ranks)
    sent = np.zeros((2, ranks, ranks), np.int64)
    np.add.at(sent[0], home, pairs)
    np.add.at(sent[1], home, pairs > 0)
    return Rows(sent[0], sent[1])


def uniform_fan_out(experts: int, ranks: int, top_k: int) -> float:
    """The mean fan-out of tokens that take any k experts alike: `G (1 - C(E - E/G, k) / C(E, k))`."""
    return ranks * (1 - comb(experts - experts // ranks, top_k) / comb(experts, top_k))


def volume_classic(ranks: int, top_k: int, capacity_factor: float = 1.0) -> float:
    """Volume of a rank and layer, in n h elements: DeepSpeed's classic layer under tensor parallelism.

    An all-reduce, two all-to-alls of the capacity, and the all-gather of the capacity. Bytes: times n h and an
    element's. The paper's formula, to compare counts with: no plan and no layer computes by it.
    """
    share = (ranks - 1) / ranks
    return 2 * share + 2 * top_k * capacity_factor * share / ranks + top_k * capacity_factor * share


def volume_shuffled(ranks: int, top_k: int, alpha: float) -> float:
    """The same with shuffled tokens: reduce-scatter and all-gather, and only what leaves its rank, one row a pair.

    An upper bound for deduplicated rows. The paper's formula, too: tests find its second term to be exactly what `rows`
    counts, a row a pair.
    """
    return 2 * (ranks - 1) / ranks + 2 * alpha * top_k / ranks

"""What is grouped: one layer's counts, the ranks, and how uneven their loads may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forerun.moe.homes import homes

__all__ = ["Limits", "Rating", "Task", "nearness"]


class Limits(NamedTuple):
    """How far a rank's load may be above the mean: max/mean."""

    experts: float = 1.25  # of (token, expert) pairs that its experts compute
    tokens: float = 1.1  # of token occurrences that are at home on it


class Rating(NamedTuple):
    """What a placement is worth on a table."""

    local: float  # local activation rate: the share of (token, expert) pairs whose expert is on the token's home
    saved: float  # the same, with pairs on near ranks counted by their nearness
    experts: float  # experts' load, max/mean over the ranks
    tokens: float  # tokens' load, max/mean over the ranks
    home: NDArray[np.int64]  # [N]


def nearness(ranks: int, hosts: int = 1, near: float = 0.0) -> NDArray[np.float32]:
    """`[R, R]` the share of a far transfer's cost that is saved where an expert is on rank s and its token on rank r.

    Args:
        ranks: R.
        hosts: Of equally many ranks, next to each other.
        near: What a transfer inside a host saves: 1 - its cost / a transfer's between hosts.

    Raises:
        ValueError: The hosts do not divide the ranks, or near is not in [0, 1).
    """
    if ranks < 1 or hosts < 1 or ranks % hosts:
        raise ValueError(f"{ranks} ranks on {hosts} hosts: expected equally many ranks, at least one, on each host")
    if not 0 <= near < 1:
        raise ValueError(f"near is {near}; expected 0 (as dear as between hosts) or more, below 1 (free)")
    host = np.arange(ranks) * hosts // ranks
    same = (host[:, None] == host).astype(np.float32) * (near if hosts > 1 else 0.0)
    return np.asarray(np.maximum(same, np.eye(ranks, dtype=np.float32)))


@dataclass(frozen=True, eq=False)
class Task:
    """Experts to be put on ranks, E/R on each.

    Args:
        counts: `[N, E]` how often token id n was sent to expert e.
        nearness: `[R, R]` of `nearness`.
        top_k: Experts of an occurrence.
        limits: Of the loads.

    Raises:
        ValueError: The ranks do not divide the experts, or a limit is below 1.
    """

    counts: NDArray[np.float32]
    nearness: NDArray[np.float32]
    top_k: int
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.counts.ndim != 2 or not np.isfinite(self.counts).all() or (self.counts < 0).any():
            raise ValueError(f"counts {list(self.counts.shape)} must be [N, E], finite and not negative")
        if not self.counts.any():
            raise ValueError("counts are all zero: there is nothing to group by")
        if self.experts % self.ranks:
            raise ValueError(f"{self.experts} experts do not divide by {self.ranks} ranks; expected E/R on each rank")
        if not min(self.limits) >= 1:
            raise ValueError(f"limits are {self.limits}; expected max/mean of 1 or more")

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.nearness)

    @property
    def experts(self) -> int:
        """E."""
        return int(self.counts.shape[1])

    @cached_property
    def by_expert(self) -> NDArray[np.float32]:
        """`[E, N]` the counts, each expert's next to each other."""
        return np.ascontiguousarray(self.counts.T, np.float32)

    @cached_property
    def load(self) -> NDArray[np.float64]:
        """`[E]` pairs that each expert computes."""
        return np.asarray(self.counts.sum(0, dtype=np.float64))

    @cached_property
    def occurrences(self) -> NDArray[np.float64]:
        """`[N]`."""
        return np.asarray(self.counts.sum(1, dtype=np.float64) / self.top_k)

    @property
    def expert_limit(self) -> float:
        """Most pairs that a rank's experts may compute."""
        return float(self.limits.experts * self.load.sum() / self.ranks * (1 + 1e-9))

    @property
    def token_limit(self) -> float:
        """Most occurrences that may be at home on a rank."""
        return float(self.limits.tokens * self.occurrences.sum() / self.ranks * (1 + 1e-9))

    def gain(self, rank: NDArray[np.int64]) -> NDArray[np.float32]:
        """`[R, N]` pairs that are saved if token id n is at home on rank r, experts placed as given (`[E]`)."""
        member = np.eye(self.ranks, dtype=np.float32)[rank]  # [E, R]
        return np.asarray(self.nearness @ (member.T @ self.by_expert), np.float32)

    def rate(self, rank: NDArray[np.int64]) -> Rating:
        """A placement (`[E]` the rank of each expert), with the best homes found for it."""
        gain = self.gain(rank)
        home, _ = homes(gain, self.occurrences, self.token_limit)
        return self.rate_with(rank, home)

    def rate_with(self, rank: NDArray[np.int64], home: NDArray[np.int64]) -> Rating:
        """A placement with these homes (`[N]`)."""
        pairs = np.zeros((self.ranks, self.experts))  # [R, E] of tokens at home on r
        np.add.at(pairs, home, self.counts.astype(np.float64))
        total = pairs.sum()
        return Rating(
            local=float(pairs[rank, np.arange(self.experts)].sum() / total),
            saved=float((pairs * self.nearness[:, rank]).sum() / total),
            experts=_over_mean(np.bincount(rank, self.load, self.ranks)),
            tokens=_over_mean(np.bincount(home, self.occurrences, self.ranks)),
            home=home,
        )


def _over_mean(load: NDArray[Any]) -> float:
    return float(load.max() / load.mean())

"""Which share of a pass each rank of a chain takes, and whether the pass is split at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

from forerun.runahead.batch import Batch, as_one, divide
from forerun.runahead.chain import Chain
from forerun.runahead.partition import search
from forerun.runahead.table import Table

__all__ = ["Chooser", "FixedShares", "SearchedShares", "TableShares", "split_pass"]

_GRID = 128  # blocks of a pass that the search looks at
_KEPT = 4096  # passes whose shares are remembered


class Chooser(Protocol):
    """Says how a pass is shared; the same on every rank."""

    def shares(self, lengths: tuple[int, ...], cached: tuple[int, ...]) -> tuple[float, ...] | None:
        """`[R]` shares that add up to 1; None: the pass is not split.

        Args:
            lengths: `[B]` tokens to compute of each sequence.
            cached: `[B]` tokens before them that every rank holds.
        """


@dataclass(frozen=True)
class FixedShares:
    """The same shares for every pass of so many tokens."""

    given: tuple[float, ...]
    least: int = 2

    def shares(self, lengths: tuple[int, ...], cached: tuple[int, ...]) -> tuple[float, ...] | None:
        return self.given if sum(lengths) >= self.least else None


@dataclass(frozen=True)
class SearchedShares:
    """The shares that the model of the chain finds soonest; none where one rank is as soon.

    Args:
        chain: The ranks and their links.
        ranks: R: all of them take part, or none does.
        slack: The pass is split if that is sooner by more than this share.
    """

    chain: Chain
    ranks: int
    slack: float = 0.01

    def shares(self, lengths: tuple[int, ...], cached: tuple[int, ...]) -> tuple[float, ...] | None:
        return _searched(self, lengths, cached)


@dataclass(frozen=True)
class TableShares:
    """A table's shares; where its row has fewer contexts than there are ranks, its chain is searched.

    Raises:
        ValueError: The table is for another number of engines.
    """

    table: Table
    ranks: int

    def __post_init__(self) -> None:
        if self.table.engines != self.ranks:
            raise ValueError(f"the table is for {self.table.engines} engines; expected {self.ranks}, one for each rank")

    def shares(self, lengths: tuple[int, ...], cached: tuple[int, ...]) -> tuple[float, ...] | None:
        chain, tokens, past = as_one(self.table.chain, lengths, cached)
        split = replace(self.table, chain=chain).split(tokens, past)
        if len(split.contexts) == self.ranks:
            return tuple(n / tokens for n in split.contexts)
        if len(split.contexts) == 1:
            return None
        return SearchedShares(self.table.chain, self.ranks, self.table.slack).shares(lengths, cached)


def split_pass(chooser: Chooser, lengths: Sequence[int], cached: Sequence[int]) -> Batch | None:
    """The contexts of a pass; None where it is not split: by choice, or as a rank would have no token."""
    shares = chooser.shares(tuple(lengths), tuple(cached)) if lengths and min(lengths) > 0 else None
    if shares is None:
        return None
    batch = Batch(divide(lengths, shares), tuple(cached))
    return batch if min(batch.totals) > 0 else None


@lru_cache(maxsize=_KEPT)
def _searched(asked: SearchedShares, lengths: tuple[int, ...], cached: tuple[int, ...]) -> tuple[float, ...] | None:
    chain, tokens, past = as_one(asked.chain, lengths, cached)
    block = max(1, tokens // _GRID)
    if -(-tokens // block) < asked.ranks:
        return None
    split = search(chain, tokens, asked.ranks, fewest=asked.ranks, block=block, cached=past)
    if split.ttft * (1 + asked.slack) >= split.single:
        return None
    return tuple(n / tokens for n in split.contexts)

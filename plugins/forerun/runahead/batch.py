"""Contexts of all sequences that one pass prefills together: who computes which rows, and what stands before them.

Every rank takes the same share of every sequence. Each sequence's last token is the last rank's, which so has all rows
that give a first token.

Axes: B sequences of a pass, R ranks of a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from forerun.runahead.chain import Chain

__all__ = ["Batch", "as_one", "divide"]


@dataclass(frozen=True)
class Batch:
    """A pass over several sequences, each split over the same ranks.

    Args:
        contexts: `[B][R]` tokens; a rank may have none of a sequence.
        cached: `[B]` tokens before each sequence's first context, which every rank holds.

    Raises:
        ValueError: There is no sequence, or the numbers do not fit each other.
    """

    contexts: tuple[tuple[int, ...], ...]
    cached: tuple[int, ...]

    def __post_init__(self) -> None:
        ranks = {len(own) for own in self.contexts}
        if len(ranks) != 1 or len(self.cached) != len(self.contexts):
            raise ValueError(f"contexts {self.contexts} with {self.cached} cached; expected R numbers and one for each")
        if any(n < 0 for own in self.contexts for n in own) or any(own[-1] < 1 for own in self.contexts):
            raise ValueError(f"contexts {self.contexts}: expected 0 or more tokens, of the last rank 1 or more")
        if min(self.cached) < 0:
            raise ValueError(f"cached is {self.cached}; expected 0 or more")

    @property
    def ranks(self) -> int:
        return len(self.contexts[0])

    @property
    def totals(self) -> tuple[int, ...]:
        """`[R]` rows of each rank."""
        return tuple(sum(own) for own in zip(*self.contexts, strict=True))

    def rows(self, rank: int) -> list[int]:
        """Rows of a rank, counted in the pass' own order: sequence after sequence."""
        found: list[int] = []
        first = 0
        for own in self.contexts:
            start = first + sum(own[:rank])
            found += range(start, start + own[rank])
            first += sum(own)
        return found

    def order(self, ranks: int) -> list[int]:
        """Rows of the first so many ranks, rank after rank: the order in which keys and values travel."""
        return [row for rank in range(ranks) for row in self.rows(rank)]

    def lasts(self) -> list[int]:
        """`[B]` the row of each sequence's last token."""
        return [end - 1 for end in accumulate(sum(own) for own in self.contexts)]

    def queries(self, rank: int) -> tuple[int, ...]:
        """`[B]` a rank's own tokens."""
        return tuple(own[rank] for own in self.contexts)

    def keys(self, rank: int) -> tuple[int, ...]:
        """`[B]` tokens that a rank attends to: the cached ones and all up to its context's end."""
        return tuple(past + sum(own[: rank + 1]) for past, own in zip(self.cached, self.contexts, strict=True))


def divide(lengths: Sequence[int], shares: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """`[B][R]` contexts near the shares.

    Args:
        lengths: `[B]` tokens to compute of each sequence.
        shares: `[R]` of every sequence; they add up to 1.

    Raises:
        ValueError: A length is below 1, or the shares are none.
    """
    if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares are {list(shares)}; expected numbers above 0 that add up to 1")
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths are {list(lengths)}; expected at least one, each 1 or more")
    inner = list(accumulate(shares))[:-1]
    ends = [[0, *(min(round(end * n), n - 1) for end in inner), n] for n in lengths]
    return tuple(tuple(end - start for start, end in pairwise(own)) for own in ends)


def as_one(chain: Chain, lengths: Sequence[int], cached: Sequence[int]) -> tuple[Chain, int, int]:
    """One prompt that takes what sequences split by the same shares take together: chain, tokens, cached tokens.

    With `n` and `P` of each sequence, attention of the shares from x to y costs
    `a * sum(2 * P * n * (y - x) + n**2 * (y**2 - x**2))`: that of one prompt of `N = sum(n)` tokens after
    `N * sum(P * n) / sum(n**2)` cached ones, at `a * sum(n**2) / N**2` a pair. Only reading the cached keys
    (`per_past`) is counted by the prompt's cached tokens.
    """
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    past = round(tokens * sum(p * n for p, n in zip(cached, lengths, strict=True)) / squares)
    cost = replace(chain.cost, per_pair=chain.cost.per_pair * squares / tokens**2)
    return replace(chain, cost=cost), tokens, past

"""Which of two ways a layer takes for a batch: two sums over all ranks, or tokens to their experts' ranks and back.

Sums over all ranks send the same bytes whatever the routing. Tokens that are spread over the ranks send less where
their experts are at hand, and take more collectives to do so, which a small batch pays for. So both are measured once,
and what a batch would take is told from its tokens and from the rows that they are expected to send.

All ranks choose alike: what they choose by is the same on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from forerun.moe.exchange import Group

__all__ = ["Choice", "Rates", "measure"]

_MEMORY = 1024  # tokens that the expectation counts as
_AGAIN = 256  # batches of stock's way until ours is looked at once more


@dataclass(frozen=True)
class Rates:
    """What a layer's collectives take, in seconds.

    Args:
        summed: Both sums, whatever their size; and for each token.
        spread: Both halves and the exchange, whatever their size; for each token; and for each row that leaves.
    """

    summed: tuple[float, float]
    spread: tuple[float, float, float]

    def saves(self, tokens: int, rows: float) -> float:
        """Seconds that spreading so many tokens takes less, if so many rows leave their rank in all."""
        ours = self.spread[0] + self.spread[1] * tokens + self.spread[2] * rows
        return self.summed[0] + self.summed[1] * tokens - ours

    def gains(self, tokens: int, rows: float) -> bool:
        """Whether it takes less."""
        return self.saves(tokens, rows) > 0


class Choice:
    """One layer's choice, batch by batch, and what it learns of the rows that really leave.

    Args:
        rates: Of the layer's ranks; None: ours is always chosen.
        expected: Rows that a token sends to other ranks.
    """

    def __init__(self, rates: Rates | None, expected: float) -> None:
        self._rates, self.expected = rates, expected
        self.unplanned = expected  # the same where experts lie in order
        self._passed = 0

    @property
    def learns(self) -> bool:
        """Whether it wants to be told by `saw`."""
        return self._rates is not None

    def spreads(self, tokens: int) -> bool:
        """Whether a batch of so many tokens is spread."""
        if self._rates is None or self._rates.gains(tokens, tokens * self.expected):
            return True
        if self._rates.gains(tokens, 0):
            self._passed += 1
        if self._passed < _AGAIN:
            return False
        self._passed = 0
        return True

    def saves(self, tokens: int) -> float:
        """Seconds that a batch of so many tokens takes less than without a plan, but for its experts."""
        if self._rates is None:
            return 0.0
        planned, unplanned = (self._rates.saves(tokens, tokens * rows) for rows in (self.expected, self.unplanned))
        return max(0.0, planned) - max(0.0, unplanned)

    def saw(self, sent: float, tokens: int) -> None:
        """Each of so many tokens sent so many rows on the mean; the same on all ranks."""
        self.expected += (sent - self.expected) * tokens / (tokens + _MEMORY)


def measure(
    summed: Callable[[int], None],
    spread: Callable[[int, int], None],
    group: Group = None,
    *,
    sizes: tuple[int, int] = (8, 512),
    repeats: int = 7,
    wait: Callable[[], None] = lambda: None,
) -> Rates:
    """Times both ways on batches of two sizes; all ranks of the group call it alike.

    Args:
        summed: Runs both sums over so many tokens.
        spread: Runs both halves over so many tokens, and an exchange in which each rank sends so many rows.
        group: Of the ranks; None: all.
        sizes: Tokens of the small and of the large batch.
        repeats: Of each; the least counts, as what else the machine does at a server's start comes on top.
        wait: Until the device has done what it was asked.
    """

    def taken(run: Callable[[], None]) -> float:
        spent = []
        for _ in range(repeats + 1):
            dist.barrier(group)
            start = time.perf_counter()
            run()
            wait()
            spent.append(time.perf_counter() - start)
        return min(spent[1:])  # the first one makes connections

    small, large = sizes
    ranks = dist.get_world_size(group)
    told = torch.tensor(
        [
            taken(lambda: summed(small)),
            taken(lambda: summed(large)),
            taken(lambda: spread(small, 0)),
            taken(lambda: spread(large, 0)),
            taken(lambda: spread(large, large // ranks)),
        ],
        dtype=torch.float64,
    )
    every = [told] * ranks
    dist.all_gather_object(every, told, group=group)
    first, second, third, fourth, fifth = torch.stack(every).max(0).values.tolist()

    def line(low: float, high: float) -> tuple[float, float]:
        slope = max(0.0, (high - low) / (large - small))
        return max(0.0, low - slope * small), slope

    rows = large // ranks * ranks
    return Rates(line(first, second), (*line(third, fourth), max(0.0, (fifth - fourth) / rows)))

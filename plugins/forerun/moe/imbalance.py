"""What a plan costs where a batch asks for experts that it has put together: one rank computes while others wait.

A plan puts experts together that a token asks for together, so that less travels. A batch of one topic then has most of
its experts on one rank, and a few tokens that are decoded may too, which no balance over a whole profile forbids. So
batches are counted: what their experts take where the plan has them, what they would take in order, and what the plan
saves on the wire. Nothing is moved or computed twice to know it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from forerun.moe.exchange import Group

__all__ = ["ExpertTimes", "Ledger", "measure"]

_ROWS = (1, 2, 4, 16)  # of each expert, that are timed
_BATCHES = 64  # counted, after which it is asked whether the plan is worth it
_EACH = 16  # of later batches, one is counted


@dataclass(frozen=True)
class ExpertTimes:
    """What an expert takes, in seconds, by the rows that it is asked about: not a line, as kernels differ for few rows.

    Args:
        rows: That were timed, rising, two or more; in between and beyond the last two, lines.
        alone: While the other ranks wait.
        together: While all ranks compute, which may share cores, memory or power.
    """

    rows: Sequence[int]
    alone: Sequence[float]
    together: Sequence[float]

    def seconds(self, pairs: Tensor, place: Tensor, ranks: int) -> Tensor:
        """`[L]` what each layer takes, as long as the rank that is last.

        What others add to a rank's own time, as they compute at once, is what they have to do in the mean: of cores or
        memory that all ranks share, or some of them do.

        Args:
            pairs: `[L, E]` rows that each expert is asked about.
            place: `[L, E]` where it lies: rank r holds the places from r E/R on.
            ranks: R.
        """
        alone, together = self._each(pairs, self.alone), self._each(pairs, self.together)
        to = place // (pairs.shape[1] // ranks)
        own, shared = (
            each.new_zeros(len(pairs), ranks).scatter_add_(1, to, each)
            for each in (alone, (together - alone).clamp(min=0))
        )
        others = (shared.sum(1, keepdim=True) - shared) / max(1, ranks - 1)
        return (own + others).amax(1)

    def _each(self, pairs: Tensor, spent: Sequence[float]) -> Tensor:
        """`[L, E]` what each expert takes."""
        asked, (rows, seconds) = (
            pairs.double(),
            (pairs.new_tensor(told, dtype=torch.float64) for told in (self.rows, spent)),
        )
        after = torch.bucketize(asked, rows).clamp(1, len(rows) - 1)
        row = (seconds[after] - seconds[after - 1]) / (rows[after] - rows[after - 1])
        return torch.where(pairs > 0, seconds[after - 1] + row * (asked - rows[after - 1]), 0.0)


class Ledger:
    """What a plan saves and costs in the batches that come; all ranks of the group call it alike.

    Args:
        times: Of the experts, the same on all ranks.
        place: `[L, E]` where the plan has each layer's experts.
        ranks: R.
        group: Of the ranks; None: all.
        shown: Whether batches of so many tokens do save what is expected; None: it is not known yet.
        batches: Counted before an answer; all of the first ones, and one of 16 from then on.
    """

    def __init__(
        self,
        times: ExpertTimes,
        place: Tensor,
        ranks: int,
        group: Group = None,
        *,
        shown: Callable[[int], bool | None] = lambda tokens: True,
        batches: int = _BATCHES,
    ) -> None:
        self._times, self._place, self._ranks, self._group = times, place, ranks, group
        self._shown, self._batches = shown, batches
        self._in_order = torch.arange(place.shape[1], device=place.device).expand_as(place)
        self._seen = self._counted = 0
        self._saved: dict[int, float] = {}  # s, by tokens of a batch, since the last answer
        self._cost = 0.0  # s, since the last answer
        self._before = (0, 0.0, 0.0)  # batches, saved and cost until the last answer

    def counts(self) -> bool:
        """Whether the batch that begins is counted."""
        self._seen += 1
        return self._counted < self._batches or self._seen % _EACH == 0

    def saw(self, pairs: Tensor, tokens: int, saved: float) -> None:
        """A batch that is counted is through.

        Args:
            pairs: `[L, E]` of each expert, of this rank's tokens, or of all tokens on one rank and none on the others.
            tokens: Of the batch.
            saved: Seconds that it takes less than without the plan, but for the experts, as it is expected.
        """
        told = pairs.clone()
        dist.all_reduce(told, group=self._group)
        planned, in_order = (
            float(self._times.seconds(told, place, self._ranks).sum()) for place in (self._place, self._in_order)
        )
        self._cost += planned - in_order
        self._saved[tokens] = self._saved.get(tokens, 0.0) + saved
        self._counted += 1

    def worth(self) -> bool | None:
        """Whether the plan is worth what it costs, by the batches since the last answer.

        None: they are too few, or it depends on savings that are not shown yet.
        """
        if self._counted - self._before[0] < self._batches:
            return None
        account = torch.tensor([*self._bounds(), self._cost], dtype=torch.float64, device=self._place.device)
        dist.all_reduce(account, group=self._group)  # so that no rounding parts the ranks
        least, most, cost = account.tolist()
        if least < cost <= most:
            return None
        told = self.state()
        self._before = self._counted, told["saved"], told["cost"]
        self._saved, self._cost = {}, 0.0
        return bool(cost <= least)

    def state(self) -> dict[str, float]:
        """What is known so far, in seconds; savings that are not shown yet are among it."""
        _, saved, cost = self._before
        return {"batches": self._counted, "saved": saved + self._bounds()[1], "cost": cost + self._cost}

    def _bounds(self) -> tuple[float, float]:
        """Seconds saved since the last answer: what is shown, and what may be."""
        known = [(self._shown(tokens), saved) for tokens, saved in self._saved.items()]
        shown = sum(saved for way, saved in known if way)
        return shown, shown + sum(saved for way, saved in known if way is None)


def measure(
    compute: Callable[[int], None],
    experts: int,
    group: Group = None,
    *,
    repeats: int = 5,
    wait: Callable[[], None] = lambda: None,
) -> ExpertTimes:
    """Times a layer's experts on one rank and on all at once; all ranks of the group call it alike.

    Args:
        compute: Asks every expert of this rank about so many rows.
        experts: Their number.
        group: Of the ranks; None: all.
        repeats: Of each; the least counts, as what else the machine does at a server's start comes on top.
        wait: Until the device has done what it was asked.
    """

    def taken(rows: int) -> float:
        start = time.perf_counter()
        compute(rows)
        wait()
        return time.perf_counter() - start

    compute(_ROWS[0])  # memory, kernels
    alone, together = ([float("inf")] * len(_ROWS) for _ in range(2))
    for _ in range(repeats):
        for at, rows in enumerate(_ROWS):
            dist.barrier(group)
            if dist.get_rank(group) == 0:
                alone[at] = min(alone[at], taken(rows))
            dist.barrier(group)
            together[at] = min(together[at], taken(rows))
    every: list[tuple[list[float], list[float]]] = [(alone, together)] * dist.get_world_size(group)
    dist.all_gather_object(every, (alone, together), group=group)
    means = [fmean(spent) for spent in zip(*(told for _, told in every), strict=True)]
    return ExpertTimes(_ROWS, *(tuple(spent / experts for spent in told) for told in (every[0][0], means)))

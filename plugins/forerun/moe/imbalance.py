"""What a plan costs where a batch asks for experts that it has put together: one rank computes while others wait.

A plan puts experts together that a token asks for together, so that less travels. A batch of one topic then has most of
its experts on one rank, and a few tokens that are decoded may too, which no balance over a whole profile forbids. So
batches are counted: what their experts take where the plan has them, what they would take in order, and what the plan
saves on the wire. Nothing is moved or computed twice to know it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from forerun.moe.exchange import Group

__all__ = ["ExpertTimes", "Ledger", "measure"]

_FEW, _MANY = 1, 16  # rows of each expert, that are timed
_BATCHES = 64  # counted, after which it is asked whether the plan is worth it
_EACH = 16  # of later batches, one is counted


@dataclass(frozen=True)
class ExpertTimes:
    """What a layer's experts take on a rank, in seconds: for each expert that is asked at all, and for each row.

    Args:
        alone: While the other ranks wait.
        together: While all ranks compute, which may share cores, memory or power.
    """

    alone: tuple[float, float]
    together: tuple[float, float]

    def seconds(self, pairs: Tensor, place: Tensor, ranks: int) -> Tensor:
        """`[L]` what each layer takes, as long as the rank that is last.

        What others add to a rank's own time, as they compute at once, is what they have to do in the mean: of cores or
        memory that all ranks share, or some of them do.

        Args:
            pairs: `[L, E]` rows that each expert is asked about.
            place: `[L, E]` where it lies: rank r holds the places from r E/R on.
            ranks: R.
        """
        to = place // (pairs.shape[1] // ranks)
        rows, asked = (
            torch.zeros(len(pairs), ranks, dtype=torch.float64, device=pairs.device).scatter_add_(1, to, told.double())
            for told in (pairs, pairs > 0)
        )
        alone, shared = (
            each * asked + row * rows
            for each, row in (self.alone, [max(0.0, b - a) for a, b in zip(self.alone, self.together, strict=True)])
        )
        others = (shared.sum(1, keepdim=True) - shared) / max(1, ranks - 1)
        return (alone + others).amax(1)


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

    compute(_FEW)  # memory, kernels
    told = [float("inf")] * 4
    for _ in range(repeats):
        dist.barrier(group)
        if dist.get_rank(group) == 0:
            told[:2] = [min(told[at], taken(rows)) for at, rows in enumerate((_FEW, _MANY))]
        for at, rows in enumerate((_FEW, _MANY), 2):
            dist.barrier(group)
            told[at] = min(told[at], taken(rows))
    every: list[list[float]] = [told] * dist.get_world_size(group)
    dist.all_gather_object(every, told, group=group)
    alone, together = every[0][:2], [fmean(one[at] for one in every) for at in (2, 3)]

    def parts(few: float, many: float) -> tuple[float, float]:
        row = max(0.0, (many - few) / (_MANY - _FEW))
        return max(0.0, few - _FEW * row) / experts, row / experts

    return ExpertTimes(parts(*alone), parts(*together))

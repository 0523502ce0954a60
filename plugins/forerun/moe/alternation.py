"""Whether what should be sooner is: two ways by turns, on batches of like size, and the sooner one from then on.

Both ways give the same answer, so nothing is run twice. The ranks of a group, which have the same batches, add up what
they measured and decide alike: after a few turns where one way clearly takes longer, after all of them otherwise. By
turns does not mean of one size: what more tokens take is taken off before the ways are compared. Ours is kept where it
is sooner by more than chance makes of so few batches; the other one, which was there before, where that is not to be
seen. As links and loads change, what was decided is tried again after many batches.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from statistics import fmean, median

import torch
import torch.distributed as dist

from forerun.moe.exchange import Group

__all__ = ["Alternation"]

_logger = logging.getLogger(__name__)
_FEW = 3  # turns, after which a clear difference decides
_CLEAR = 1.25  # the longer time over the shorter one
_DEVIATION = 1.253 * 1.4826  # standard error of a normal median times the root of their number, by median deviations
_AGAIN = 4096  # batches of a size until it is tried again


_Seen = tuple[int, float]  # tokens of a batch, seconds that it took


@dataclass
class _Size:
    """Batches of one size, to a power of two."""

    batches: int = 0
    seen: tuple[list[_Seen], list[_Seen]] = field(default_factory=lambda: ([], []))  # of the other way, of ours
    medians: tuple[float, float, float] = (0.0, 0.0, 0.0)  # s, and what chance makes of them, when it was decided
    ours: bool | None = None  # None: not decided


class Alternation:
    """Tries a way against another one.

    Args:
        turns: Batches of each size by each way, a first one of each left aside, before it is decided at the latest.
        group: Of the ranks that have the same batches; None: all.
        way, other: What they are called in what is said of the decision.
        again: Batches of a size until it is tried again.
    """

    def __init__(
        self, turns: int, group: Group = None, way: str = "ours", other: str = "the other", again: int = _AGAIN
    ) -> None:
        self._turns, self._group, self._names, self._again = turns, group, (other, way), again
        self._sizes: dict[int, _Size] = {}
        self._running: tuple[_Size, bool, torch.device, float] | None = None

    def begin(self, tokens: int, device: torch.device) -> bool:
        """Whether a batch of so many tokens goes our way; its time runs from here to `end`."""
        size = self._sizes.setdefault(tokens.bit_length(), _Size())
        self._running = None
        if size.ours is not None and size.batches < self._again:
            size.batches += 1
            return size.ours
        if size.ours is not None:
            size.ours, size.batches, size.seen = None, 0, ([], [])
        ours = size.batches % 2 == 0
        self._running = size, ours, device, _now(device)
        return ours

    def end(self, tokens: int) -> bool | None:
        """The batch is through; those that may decide wait for all ranks.

        Returns:
            Whether our way is kept for batches of its size, if this one decided it.
        """
        if self._running is None:
            return None
        (size, ours, device, start), self._running = self._running, None
        if size.batches >= 2:
            size.seen[ours].append((tokens, _now(device) - start))
        size.batches += 1
        turns = size.batches / 2 - 1
        if turns not in (_FEW, self._turns):
            return None
        told = torch.tensor(_typical(size.seen), dtype=torch.float64, device=device)
        dist.all_reduce(told, group=self._group)
        other, way, chance = (told / dist.get_world_size(self._group)).tolist()
        clear = max(other, way) >= _CLEAR * min(other, way)
        if turns < self._turns and not clear:
            return None
        size.ours, size.medians = way < other - (0.0 if clear else chance), (other, way, chance)
        _logger.info("batches of %s", self.told(tokens))
        return size.ours

    def kept(self, tokens: int) -> bool | None:
        """Whether our way is kept for batches of so many tokens; None: it is not known yet."""
        size = self._sizes.get(tokens.bit_length())
        return None if size is None else size.ours

    def state(self) -> list[str]:
        """What was decided, or that it is not yet, a line for each size of batches."""
        return [self._told(bits, size) for bits, size in sorted(self._sizes.items())]

    def told(self, tokens: int) -> str:
        """What was decided for batches of so many tokens."""
        return self._told(tokens.bit_length(), self._sizes[tokens.bit_length()])

    def _told(self, bits: int, size: _Size) -> str:
        least, (other, way) = 1 << max(bits - 1, 0), self._names
        tokens = f"{least} to {2 * least - 1} tokens"
        if size.ours is None:
            return f"{tokens}: {way} and {other} by turns, {size.batches} batches so far"
        its, ours, chance = (1e3 * spent for spent in size.medians)
        spent = f"{way} {ours:.2f} ms, {other} {its:.2f} ms, by chance {chance:.2f} ms"
        return f"{tokens}: {spent}; {self._names[bool(size.ours)]} is kept"


def _typical(seen: Sequence[Sequence[_Seen]]) -> list[float]:
    """The median seconds of each way on as many tokens as all had in the mean, and by how much chance parts the two.

    A further token takes the median of what it took between any two batches of a way (the Theil-Sen estimator). Chance
    is the standard error of the difference, by the median deviations.
    """
    pairs = chain.from_iterable(combinations(way, 2) for way in seen)
    slopes = [
        (spent - its) / (tokens - its_tokens) for (tokens, spent), (its_tokens, its) in pairs if tokens != its_tokens
    ]
    further = max(0.0, median(slopes or [0.0]))
    middle = fmean(tokens for tokens, _ in chain.from_iterable(seen))
    spent = [[seconds - further * (tokens - middle) for tokens, seconds in way] for way in seen]
    medians = [median(way) for way in spent]
    variances = [
        (_DEVIATION * median(abs(one - its) for one in way)) ** 2 / len(way)
        for way, its in zip(spent, medians, strict=True)
    ]
    return [*medians, math.sqrt(sum(variances))]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

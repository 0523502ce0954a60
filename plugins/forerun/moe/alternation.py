"""Whether what should be sooner is: two ways by turns, on batches of like size, and the sooner one from then on.

Both ways give the same answer, so nothing is run twice. The ranks of a group, which have the same batches, add up what
they measured and decide alike.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from forerun.moe.exchange import Group

__all__ = ["Alternation"]

_logger = logging.getLogger(__name__)


@dataclass
class _Size:
    """Batches of one size, to a power of two."""

    batches: int = 0
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of the other way, of ours
    ours: bool | None = None  # None: not decided


class Alternation:
    """Tries a way against another one.

    Args:
        turns: Batches of each size by each way, a first one of each left aside, before it is decided.
        group: Of the ranks that have the same batches; None: all.
        way, other: What they are called in what is said of the decision.
    """

    def __init__(self, turns: int, group: Group = None, way: str = "ours", other: str = "the other") -> None:
        self._turns, self._group, self._names = turns, group, (other, way)
        self._sizes: dict[int, _Size] = {}
        self._running: tuple[_Size, bool, torch.device, float] | None = None

    def begin(self, tokens: int, device: torch.device) -> bool:
        """Whether a batch of so many tokens goes our way; its time runs from here to `end`."""
        size = self._sizes.setdefault(tokens.bit_length(), _Size())
        if size.ours is not None:
            self._running = None
            return size.ours
        ours = size.batches % 2 == 0
        self._running = size, ours, device, _now(device)
        return ours

    def end(self, tokens: int) -> None:
        """The batch is through; the last one of a trial waits for all ranks."""
        if self._running is None:
            return
        (size, ours, device, start), self._running = self._running, None
        if size.batches >= 2:
            size.seconds[ours] += _now(device) - start
        size.batches += 1
        if size.batches < 2 * (self._turns + 1):
            return
        told = torch.tensor(size.seconds, dtype=torch.float64, device=device)
        dist.all_reduce(told, group=self._group)
        seconds = (told / self._turns / dist.get_world_size(self._group)).tolist()
        size.ours = seconds[True] < seconds[False]
        ways = [f"{self._names[way]} {seconds[way] * 1e3:.2f} ms" for way in (True, False)]
        least = 1 << max(tokens.bit_length() - 1, 0)
        kept = self._names[size.ours]
        _logger.info("batches of %d to %d tokens: %s; %s is kept", least, 2 * least - 1, ", ".join(ways), kept)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

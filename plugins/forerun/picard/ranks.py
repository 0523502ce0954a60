"""A window's points over the ranks of a process group: each rank evaluates a share, all get every answer."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["PointRanks"]


class PointRanks:
    """Splits points over the ranks of a `torch.distributed` group. Every rank runs the same program.

    Args:
        group: The process group (gloo or NCCL); None for the default one.
        timeout: Seconds that one exchange may take before the rank gives up with an error.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = 60.0) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "a process group was asked for, and torch.distributed is not initialised: start the script with "
                "torchrun and call torch.distributed.init_process_group first"
            )
        self._group = group
        self._timeout = timeout
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def share(self, points: Sequence[int]) -> list[int]:
        """This rank's points; every rank has as many, so the last points are repeated where they do not divide."""
        each = -(-len(points) // self.size)
        padded = [*points, *[points[-1]] * (each * self.size - len(points))]
        return padded[self.rank * each : (self.rank + 1) * each]

    def gather(self, mine: Tensor, points: int) -> Tensor:
        """`[points, ...]` all answers, from this rank's share `[each, ...]`."""
        mine = mine.contiguous()
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(everyone, mine, group=self._group, async_op=True), "answers")
        return torch.cat(everyone)[:points]

    def assert_same_start(self, start: Tensor) -> None:
        """Raises ValueError unless every rank starts from the same sample `[B, ...]`."""
        summary = torch.stack([start.double().sum(), start.double().square().sum()])
        for row in self.gather(summary[None], self.size):
            if not torch.equal(row, summary):
                raise ValueError(
                    "the ranks of the group start from different noise: give every rank's pipeline the same generator "
                    "seed, prompt and arguments"
                )

    def slowest(self, change: Tensor) -> Tensor:
        """`change` with every rank's largest value, so that all accept the same points."""
        change = change.clone()
        self._wait(lambda: dist.all_reduce(change, dist.ReduceOp.MAX, group=self._group, async_op=True), "residuals")
        return change

    def _wait(self, exchange: object, what: str) -> None:
        try:
            assert callable(exchange)
            exchange().wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} lost another rank while exchanging {what} (waited at most "
                f"{self._timeout} s): the run cannot go on; its pipeline can be called again in a new group"
            ) from error

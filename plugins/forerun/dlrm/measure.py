"""Measures memory and links on the ranks of a process group; every rank calls `measure`, and gets the same answer.

All ranks of a host work at the same time, as they do in a training step: they share its memory and its links. A time is
that of the slowest rank, the median over repetitions after some that do not count. Bytes are counted as torchrec's
estimators divide them by a bandwidth:

- lookup: ids, rows read and outputs written by one rank, `batch * (hotness * (8 + dim * 4) + dim * 4)`;
- host_to_device: bytes copied from pinned memory;
- all_to_all, all_reduce: a rank's whole buffer; reduce_scatter: its input; all_gather: its output.

Source: torchrec@v1.8:torchrec/distributed/planner/estimator/estimator.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import embedding_bag

from forerun.dlrm.calibration import COLLECTIVES, Line, Scope, Timing, fit

__all__ = ["Effort", "LostRank", "measure"]

_DIM, _HOTNESS = 128, 20  # torchrec's block penalty is 1 for 128 columns
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    smallest: int = 64 * 1024  # bytes of the smallest message
    largest: int = 64 * 1024**2  # of the largest; each is four times the one before
    repeats: int = 15  # that count
    warm_up: int = 3  # that do not
    table: int = 256 * 1024**2  # bytes of the table that is looked up: more than the caches hold

    def __post_init__(self) -> None:
        if not 0 < 4 * self.smallest <= self.largest or self.repeats < 1 or self.warm_up < 0:
            raise ValueError(
                f"{self}: expected a largest size of at least four times the smallest, and 1 repeat or more"
            )
        if self.table < _DIM * _FLOAT:
            raise ValueError(f"a table of {self.table} bytes has no row")

    def sizes(self) -> Iterator[int]:
        """Bytes of each message."""
        size = self.smallest
        while size <= self.largest:
            yield size
            size *= 4


class LostRank(RuntimeError):
    """Another rank ended, or took longer than the process group waits."""


def measure(device: torch.device, local_size: int, effort: Effort, progress: Callable[[str], None]) -> list[Line]:
    """Everything that the ranks of the default process group can measure.

    Args:
        device: This rank's.
        local_size: Ranks a host; ranks of one host follow one another.
        progress: Is told what is measured next.

    Raises:
        LostRank: Another rank does not answer.
        ValueError: The ranks do not divide into hosts.
    """
    world = dist.get_world_size()
    if world % local_size:
        raise ValueError(f"{world} ranks do not divide into hosts of {local_size}")
    clock = _Clock(device, effort)
    lines = [clock.line("lookup", "rank", 1, _lookups(device, effort), progress)]
    if device.type == "cuda":
        lines.append(clock.line("host_to_device", "rank", 1, _copies(device, effort), progress))
    if local_size > 1:
        groups = [dist.new_group(list(range(first, first + local_size))) for first in range(0, world, local_size)]
        group = groups[dist.get_rank() // local_size]
        lines += clock.collectives("intra_host", group, progress)
    if world > local_size:
        lines += clock.collectives("inter_host", dist.GroupMember.WORLD, progress)
    return lines


Work = Iterator[tuple[int, Callable[[], Any]]]  # bytes, and what handles so many


class _Clock:
    def __init__(self, device: torch.device, effort: Effort) -> None:
        self._device, self._effort = device, effort

    def collectives(self, scope: Scope, group: dist.ProcessGroup | None, progress: Callable[[str], None]) -> list[Line]:
        assert group is not None
        return [
            self.line(name, scope, group.size(), _messages(name, group, self._device, self._effort), progress)
            for name in COLLECTIVES
        ]

    def line(self, name: str, scope: Scope, ranks: int, work: Work, progress: Callable[[str], None]) -> Line:
        timings = []
        for size, deed in work:
            progress(f"{name}, {scope}, {size} bytes")
            try:
                timings.append(Timing(size, self._slowest(deed)))
            except RuntimeError as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                told = str(error).partition("\n")[0]
                raise LostRank(
                    f"could not go on with {name}, {scope}, {size} bytes; another rank may have ended, or taken too "
                    f"long: {told}"
                ) from error
        return Line(name, scope, ranks, *fit(timings), tuple(timings))

    def _slowest(self, deed: Callable[[], Any]) -> float:
        """Median over repetitions of the slowest rank's ms."""
        took = []
        for _ in range(self._effort.warm_up + self._effort.repeats):
            dist.barrier()
            self._synchronise()
            began = time.perf_counter()
            deed()
            self._synchronise()
            took.append((time.perf_counter() - began) * 1e3)
        slowest = torch.tensor(took[self._effort.warm_up :], dtype=torch.float64, device=self._device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest.median())

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _lookups(device: torch.device, effort: Effort) -> Work:
    rows = effort.table // (_DIM * _FLOAT)
    table = torch.ones(rows, _DIM, device=device)
    sample = _HOTNESS * (8 + _DIM * _FLOAT) + _DIM * _FLOAT  # bytes
    for size in effort.sizes():
        batch = max(1, size // sample)
        # Other rows each time, as many as the table has: those of the time before may be in a cache.
        turns = max(2, min(effort.warm_up + effort.repeats, effort.table // size))
        ids = torch.randint(rows, (turns, batch, _HOTNESS), device=device)
        yield batch * sample, partial(_look_up, cycle(ids), table)


def _look_up(ids: Iterator[Tensor], table: Tensor) -> None:
    with torch.inference_mode():
        embedding_bag(next(ids), table, mode="sum")


def _copies(device: torch.device, effort: Effort) -> Work:
    for size in effort.sizes():
        here = torch.zeros(size, dtype=torch.uint8).pin_memory()
        there = torch.empty(size, dtype=torch.uint8, device=device)
        yield size, partial(there.copy_, here, non_blocking=True)


def _messages(name: str, group: dist.ProcessGroup, device: torch.device, effort: Effort) -> Work:
    ranks = group.size()
    for size in effort.sizes():
        each = max(1, size // (_FLOAT * ranks))
        whole, other = (torch.zeros(each * ranks, device=device) for _ in range(2))
        deeds: dict[str, Callable[[], Any]] = {
            "all_to_all": partial(dist.all_to_all_single, other, whole, group=group),
            "all_reduce": partial(dist.all_reduce, whole, group=group),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, other[:each], whole, group=group),
            "all_gather": partial(dist.all_gather_into_tensor, whole, other[:each], group=group),
        }
        yield each * ranks * _FLOAT, deeds[name]

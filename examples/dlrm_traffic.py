"""What a rank sends to others in its collectives, and how long it is in them: read from torch's profiler.

Every collective passes the profiler, torchrec's as well as those of data-parallel gradients, so all plans are counted
in one way. Bytes are those that leave a rank: of an all-to-all what is meant for others, of an all-reduce twice its
tensor's, but for the share that stays (ring), of an all-gather its tensor's to every other rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile

__all__ = ["Traffic", "watched"]

_BYTES = {"float": 4, "long int": 8, "long": 8, "int": 4, "double": 8, "c10::Half": 2, "c10::BFloat16": 2}


class Traffic:
    """Filled when the block that it watches ends."""

    sent = 0  # bytes
    seconds = 0.0  # s in which at least one collective was under way, waiting for other ranks included


@contextmanager
def watched(rank: int, ranks: int) -> Iterator[Traffic]:
    """Counts the collectives of a block that ran on all ranks of the default group.

    Raises:
        ValueError: A collective that is not counted yet.
    """
    traffic = Traffic()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        yield traffic
    events = profiled.profiler.kineto_results.events()
    traffic.sent = sum(_sent(event, rank, ranks) for event in events)
    spans = [(it.start_ns(), it.end_ns()) for it in events if it.name().startswith("gloo:")]
    traffic.seconds = _covered(spans) / 1e9


def _sent(event: Any, rank: int, ranks: int) -> int:
    """The bytes that leave a rank by an event; 0 where it is no collective, or counted by another event."""
    name, shapes, kinds = event.name(), event.shapes(), event.dtypes()
    if name == "c10d::alltoall_base_":  # output, input, group, rows from each rank, rows to each rank
        whole, splits = math.prod(shapes[1]), event.concrete_inputs()[4]
        own = whole * splits[rank] // sum(splits) if splits and sum(splits) else whole // ranks
        return (whole - own) * _BYTES[kinds[1]]
    if name == "gloo:all_reduce":  # gloo makes its reduce-scatter of it, too
        return 2 * math.prod(shapes[0]) * _BYTES[kinds[0]] * (ranks - 1) // ranks
    if name == "gloo:all_gather":
        return math.prod(shapes[0]) * _BYTES[kinds[0]] * (ranks - 1)
    if name.startswith("gloo:") and name not in ("gloo:all_to_all", "gloo:barrier"):
        raise ValueError(f"{name} is not counted: add what it sends")
    return 0


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    """The length of what lies in at least one span."""
    total, reached = 0, 0
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total

"""A chain's model from a second of measuring: what a rank computes, and what reaches the next one.

It stands in where no calibration was made. Ranks of one process group call it together and get the same model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from forerun.runahead.chain import Chain
from forerun.runahead.cost import Link
from forerun.runahead.lowest import attend_last
from forerun.runahead.shape import Shape

__all__ = ["probe"]

_ROWS, _SEEN = 256, 1024  # tokens that a probe computes, and attends to
_FEW, _MANY = 1 << 10, 1 << 21  # bytes sent
_REPEATS = 4


def probe(shape: Shape, group: Any, device: torch.device, dtype: torch.dtype, *, link: Link | None = None) -> Chain:
    """The model of a chain over a process group; its ranks all get the first one's times and first link.

    Args:
        shape: Of the model that the ranks run.
        group: Of two ranks or more, in the order of the chain.
        device: That they compute on.
        dtype: That they compute in.
        link: Not measured but given.
    """
    matrix = torch.randn(shape.hidden, shape.intermediate, device=device, dtype=dtype)
    rows = torch.randn(_ROWS, shape.hidden, device=device, dtype=dtype)
    product = 2 * rows.numel() * shape.intermediate / _seconds(lambda: rows @ matrix, device)
    queries = torch.randn(_ROWS, shape.heads, shape.head_size, device=device, dtype=dtype)
    keys = torch.randn(_SEEN, shape.kv_heads, shape.head_size, device=device, dtype=dtype)
    pairs = 2 * (_SEEN - _ROWS) * _ROWS + _ROWS**2
    attention = 2 * shape.heads * shape.head_size * pairs / _seconds(lambda: attend_last(queries, keys, keys), device)
    found = link or _link(group, device)
    numbers = torch.tensor([product, attention, found.bandwidth, found.latency], dtype=torch.float64, device=device)
    dist.broadcast(numbers, dist.get_global_rank(group, 0), group=group)
    product, attention, bandwidth, latency = numbers.tolist()
    cost = shape.cost(product)
    cost = replace(cost, per_pair=cost.per_pair * product / attention)
    return Chain(cost, Link(bandwidth, latency), shape.layers, shape.kv_bytes, shape.before)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The least of some runs."""
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _link(group: Any, device: torch.device) -> Link:
    """That from the first rank to the second, by sends with a byte back; the ranks behind do nothing."""
    rank = dist.get_rank(group)
    first, second = (dist.get_global_rank(group, i) for i in range(2))
    answer = torch.zeros(1, dtype=torch.uint8, device=device)

    def cross(size: int) -> float:
        sent, times = torch.zeros(size, dtype=torch.uint8, device=device), []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            if rank == 0:
                dist.send(sent, second, group=group)
                dist.recv(answer, second, group=group)
                answer.item()  # the device's queue is done
            elif rank == 1:
                dist.recv(sent, first, group=group)
                dist.send(answer, first, group=group)
            times.append(time.perf_counter() - start)
        return min(times[1:])  # the first one of all opens the connection

    few, many = cross(_FEW), cross(_MANY)
    return Link((_MANY - _FEW) / max(many - few, 1e-9), few / 2)

"""Ranks of the chains in `test_handover.py`: what each process does, and what it must find."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from forerun.runahead.handover import Handover, Kind
from forerun.runahead.traffic import all_gather, hops, returned

KIND = Kind((2, 4), (2, 3), torch.float32, torch.device("cpu"))
PASSES = (((5, 3, 2), 6), ((1, 1, 9), 2), ((4, 2, 1), 1))  # rows of three ranks, layers


def join(rank, ranks, port):
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    chain, back = (dist.new_group(list(range(ranks)), timeout=timedelta(seconds=60)) for _ in range(2))
    return Handover(chain, back, 30.0)


def keys_of(rank, layer, rows, number):
    """What a rank computes: told by whose it is, of which layer and pass."""
    base = torch.arange(rows, dtype=torch.float32) + 100 * rank + 1000 * layer + 1e5 * number
    return base[:, None, None] + torch.zeros(rows, *KIND.key), -base[:, None, None] + torch.zeros(rows, *KIND.value)


def run(rank, ranks, port):
    handover = join(rank, ranks, port)
    for number, (rows, layers) in enumerate(PASSES):
        for late in handover.settle():
            before = PASSES[number - 1][0]
            wanted = keys_of(late.rank, late.layer, before[late.rank], number - 1)
            assert late.rank > rank and torch.equal(late.key, wanted[0]) and torch.equal(late.value, wanted[1])
        handover.begin(rows, layers, KIND)
        for layer in range(layers):
            key, value = handover.exchange(*keys_of(rank, layer, rows[rank], number))
            wanted = [keys_of(i, layer, rows[i], number) for i in range(rank + 1)]
            assert torch.equal(key, torch.cat([one[0] for one in wanted]))
            assert torch.equal(value, torch.cat([one[1] for one in wanted]))
        given = torch.full((2, 3), 7.0) if rank == ranks - 1 else torch.empty(2, 3)
        assert torch.equal(handover.last(given), torch.full((2, 3), 7.0))
        parts = handover.gather(torch.full((rows[rank], 2), float(rank)), rows)
        assert [part.unique().tolist() for part in parts] == [[float(i)] for i in range(ranks)]
        handover.give_back()
    came = handover.settle()
    rows, layers = PASSES[-1]
    assert [(late.layer, late.rank) for late in came] == [
        (layer, other) for layer in range(layers) for other in range(rank + 1, ranks)
    ]
    moved = handover.moved
    sizes = [(rows, KIND.bytes * layers) for rows, layers in PASSES]
    assert moved.sent == (sum(hops(*size)[rank] for size in sizes) if rank + 1 < ranks else 0)
    assert moved.received == (sum(hops(*size)[rank - 1] for size in sizes) if rank else 0)
    assert moved.returned == sum(returned(*size)[rank] for size in sizes)
    assert moved.completed == sum(sum(rows[rank + 1 :]) * size for rows, size in sizes)
    total = torch.tensor(float(moved.sent + moved.returned))
    dist.all_reduce(total)
    assert total.item() == sum(all_gather(sum(rows), ranks, size) for rows, size in sizes)
    dist.destroy_process_group()


def left_alone(rank, ranks, port):
    handover = join(rank, ranks, port)
    handover.begin((3, 3), 2, KIND)
    if rank == 0:
        dist.recv(torch.empty(1), 1)  # it has joined and waits: this rank's store is gone with it
        os.kill(os.getpid(), signal.SIGKILL)
    dist.send(torch.ones(1), 0)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        handover.exchange(*keys_of(rank, 0, 3, 0))
    assert time.monotonic() - start < 35
    os._exit(17)

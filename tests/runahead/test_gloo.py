"""Why keys and values do not travel over a `torch.distributed` group: what one late engine does to the others."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

PATIENCE = timedelta(seconds=20)


def test_one_late_rank_cuts_off_those_that_are_well():
    """If this fails, gloo keeps its other pairs after a time-out: a group may have become a transport."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    def join(rank):
        store = dist.TCPStore("127.0.0.1", port, 3, is_master=rank == 0, timeout=PATIENCE, wait_for_workers=False)
        return dist.ProcessGroupGloo(store, rank, 3, PATIENCE)

    with ThreadPoolExecutor(3) as pool:
        mine, late, well = pool.map(join, range(3))
    buffer = torch.zeros(4)
    sent = well.send([torch.ones(4)], 0, 0)
    assert mine.recv([buffer], 2, 0).wait(PATIENCE)
    assert sent.wait(PATIENCE)
    with pytest.raises(RuntimeError, match="Timed out"):
        mine.recv([buffer], 1, 1).wait(timedelta(seconds=0.2))
    for other in (2, 1):
        with pytest.raises(RuntimeError, match="timeout caused pair closure"):
            mine.recv([buffer], other, 2).wait(PATIENCE)
    with pytest.raises(RuntimeError, match=r"(?i)clos|reset"):
        well.send([torch.ones(4)], 0, 2).wait(PATIENCE)
    assert late.rank() == 1  # it did nothing but come late

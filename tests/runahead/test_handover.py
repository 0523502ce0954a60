"""Keys and values from rank to rank: real processes over gloo."""

import socket
import time

import handover_ranks
import torch.multiprocessing as mp


def started(function, ranks):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    return mp.start_processes(function, (ranks, port), ranks, join=False, start_method="spawn")


def test_every_rank_gets_all_before_it_and_later_the_rest():
    processes = started(handover_ranks.run, 3)
    end = time.monotonic() + 180
    while not processes.join(timeout=1):
        assert time.monotonic() < end


def test_a_killed_rank_ends_the_wait_of_the_next():
    processes = started(handover_ranks.left_alone, 2)
    second = processes.processes[1]
    second.join(120)
    assert second.exitcode == 17

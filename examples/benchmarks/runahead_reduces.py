"""What tensor parallelism's all-reduces take over a link: two ranks of gloo, each in a network namespace of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

from links import ADDRESS, INTERFACE

__all__ = ["all_reduces"]

_PORT = 29555


def all_reduces(spaces: Sequence[str], elements: int, count: int) -> float:
    """Seconds of so many all-reduces of so many float32 between the first two namespaces; the slower rank's."""
    program = [sys.executable, __file__, str(elements), str(count)]
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", space, "env", f"GLOO_SOCKET_IFNAME={INTERFACE}", *program, str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, space in enumerate(spaces[:2])
    ]
    try:
        return max(float(rank.communicate(timeout=600)[0].split()[-1]) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _rank(elements: int, count: int, rank: int) -> None:
    import torch
    import torch.distributed as dist

    init = f"tcp://{ADDRESS.format(1)}:{_PORT}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    values = torch.ones(elements)
    dist.all_reduce(values)
    dist.barrier()
    began = time.monotonic()
    for _ in range(count):
        dist.all_reduce(values)
    print(time.monotonic() - began)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(*map(int, sys.argv[1:4]))

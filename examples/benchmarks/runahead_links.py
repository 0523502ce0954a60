"""A slow link between two network namespaces of this machine, and what all-reduces take over it (needs root)."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["HOSTS", "SPACES", "all_reduces", "linked"]

SPACES, HOSTS = ("forerun-a", "forerun-b"), ("10.77.0.1", "10.77.0.2")


@contextmanager
def linked(rate: str) -> Iterator[None]:
    """Two namespaces joined by a link of such a rate, as `tc` names it; removed afterwards.

    Raises:
        RuntimeError: They cannot be made: not root, or no iproute2.
    """
    _remove()
    try:
        for space in SPACES:
            _ip("netns", "add", space)
        _ip("link", "add", "veth-a", "netns", SPACES[0], "type", "veth", "peer", "name", "veth-b", "netns", SPACES[1])
        for space, host, device in zip(SPACES, HOSTS, ("veth-a", "veth-b"), strict=True):
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "address", "add", f"{host}/24", "dev", device)
            _ip("-n", space, "link", "set", device, "up")
            shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
            _call("tc", "-n", space, "qdisc", "add", "dev", device, "root", *shape)
        yield
    finally:
        _remove()


def all_reduces(elements: int, count: int) -> float:
    """Seconds of so many all-reduces of so many float32 between the namespaces, by gloo; the slower rank's."""
    program = [sys.executable, __file__, str(elements), str(count)]
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", space, "env", f"GLOO_SOCKET_IFNAME={device}", *program, str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, (space, device) in enumerate(zip(SPACES, ("veth-a", "veth-b"), strict=True))
    ]
    try:
        return max(float(rank.communicate(timeout=600)[0].split()[-1]) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()


def _remove() -> None:
    for space in SPACES:
        subprocess.run(["ip", "netns", "delete", space], capture_output=True)


def _ip(*words: str) -> None:
    _call("ip", *words)


def _call(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()} (network namespaces need root)")


def _rank(elements: int, count: int, rank: int) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://{HOSTS[0]}:29555", rank=rank, world_size=2)
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

"""Ranks in network namespaces of their own, joined by a switch, with links of a given rate: real TCP, as root only.

Each rank's port is limited both ways, as a switch's is.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

__all__ = ["ADDRESS", "INTERFACE", "limit", "namespaces", "sent"]

INTERFACE = "fr0"
ADDRESS = "10.213.47.{}"
_HUB = "forerun-hub"


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


def _name(rank: int) -> str:
    return f"forerun-{rank}"


@contextlib.contextmanager
def namespaces(ranks: int) -> Iterator[list[str]]:
    """Within, one namespace a rank (their names), each with INTERFACE at ADDRESS of its rank + 1.

    Raises:
        PermissionError: Not root.
        RuntimeError: `ip` could not make one; none is left behind.
    """
    if os.geteuid():
        raise PermissionError("network namespaces need root: run as root, or with --links loopback")
    names = [_HUB, *map(_name, range(ranks))]
    _remove(names)  # of a run that was killed
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", _HUB, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", _HUB, "link", "set", "switch", "up")
        for rank in range(ranks):
            port = f"port{rank}"
            _run("ip", "-n", _HUB, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", _name(rank))
            _run("ip", "-n", _HUB, "link", "set", port, "master", "switch")
            _run("ip", "-n", _HUB, "link", "set", port, "up")
            _run("ip", "-n", _name(rank), "addr", "add", f"{ADDRESS.format(rank + 1)}/24", "dev", INTERFACE)
            _run("ip", "-n", _name(rank), "link", "set", INTERFACE, "up")
        yield names[1:]
    finally:
        _remove(names)


def _remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def limit(rank: int, rate: str | None) -> None:
    """Sets a rank's port to a rate such as "100mbit", both ways; None: no limit."""
    for namespace, device in ((_name(rank), INTERFACE), (_HUB, f"port{rank}")):
        tc = ("tc", "-n", namespace, "qdisc")
        if rate is None:
            subprocess.run([*tc, "del", "dev", device, "root"], capture_output=True)
        else:
            _run(*tc, "replace", "dev", device, "root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")


def sent(rank: int) -> int:
    """Bytes that a rank's port has sent so far, headers and all."""
    file = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
    command = ("ip", "netns", "exec", _name(rank), "cat", file)
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

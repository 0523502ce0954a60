"""Where engines of one machine run: each on cores or GPUs of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["GPUS", "Place", "find_places", "parse_cores"]

_BIND = "VLLM_CPU_OMP_THREADS_BIND"
GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Place:
    """What an engine's processes keep to.

    Args:
        cores: They run on these; none: on any.
        variables: Of their environment.
    """

    cores: tuple[int, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def find_places(count: int, *, ranks: int = 1, cores: str | None = None, gpus: str | None = None) -> list[Place]:
    """So many places that share nothing.

    Args:
        count: Of engines.
        ranks: Tensor-parallel processes of each.
        cores: Of each engine, as "0-3|4-7"; by default this process's are dealt out, whole physical cores first, unless
            there are GPUs, or VLLM_CPU_OMP_THREADS_BIND is "nobind".
        gpus: Of each engine, as "0|1"; by default those there are, as many as an engine has ranks.

    Raises:
        ValueError: There are too few, or what is given has no meaning.
    """
    if count < 1 or ranks < 1:
        raise ValueError(f"{count} engines of {ranks} processes; expected at least one of each")
    if cores is not None:
        return [_on_cores(own, ranks) for own in parse_cores(cores, count)]
    if gpus is not None:
        given = gpus.split("|")
        if len(given) != count or not all(len(own.split(",")) == ranks for own in given):
            raise ValueError(f"GPUs {gpus!r}: expected {count} sets of {ranks}, as in 0|1")
        return [Place(variables={GPUS: own}) for own in given]
    if visible := _visible_gpus():
        if len(visible) < count * ranks:
            raise ValueError(f"{len(visible)} GPUs for {count} engines of {ranks}: take fewer engines")
        shares = [visible[i * ranks : (i + 1) * ranks] for i in range(count)]
        return [Place(variables={GPUS: ",".join(share)}) for share in shares]
    if (bind := os.environ.get(_BIND, "auto")) == "nobind":
        return [Place()] * count
    if bind != "auto":
        raise ValueError(
            f"{_BIND}={bind} would put every engine on the same cores: say --cores, each engine's apart by |"
        )
    ordered = sorted(_allowed(), key=lambda core: (_siblings(core)[0], core))
    share = len(ordered) // count
    if share < ranks:
        raise ValueError(f"{len(ordered)} cores for {count} engines of {ranks}: take fewer engines")
    return [_on_cores(ordered[i * share : (i + 1) * share], ranks) for i in range(count)]


def parse_cores(text: str, count: int) -> list[list[int]]:
    """Reads sets of cores, as "0-3|4,5".

    Raises:
        ValueError: It is none, not one for each engine, or names a core twice or one that is not there.
    """
    try:
        sets = [[core for part in own.split(",") for core in _range(part)] for own in text.split("|")]
    except ValueError:
        raise ValueError(f"cores {text!r}: expected each engine's, as in 0-3|4-7") from None
    named = [core for own in sets for core in own]
    if len(sets) != count or not all(sets):
        raise ValueError(f"cores {text!r} are for {len(sets)} engines; there are {count}")
    if len(set(named)) != len(named):
        raise ValueError(f"cores {text!r}: one is named twice")
    if strange := set(named) - _allowed():
        raise ValueError(f"cores {sorted(strange)} are not there, or not this process's: {sorted(_allowed())} are")
    return sets


def _range(text: str) -> Sequence[int]:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _on_cores(cores: Sequence[int], ranks: int) -> Place:
    """One thread a physical core; each rank has as many."""
    own = sorted(cores)
    physical = list({_siblings(core): core for core in reversed(own)}.values())[::-1]
    threads = physical if len(physical) >= ranks else own
    share = len(threads) // ranks
    if share < 1:
        raise ValueError(f"cores {own} are {len(own)}; an engine of {ranks} processes needs as many")
    bound = "|".join(",".join(map(str, threads[i * share : (i + 1) * share])) for i in range(ranks))
    return Place(tuple(own), {_BIND: bound, "OMP_NUM_THREADS": str(share)})


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(core: int) -> tuple[int, ...]:
    """All logical cores of a physical one."""
    try:
        listed = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
        return tuple(sorted(sibling for part in listed.split(",") for sibling in _range(part)))
    except (OSError, ValueError):
        return (core,)


def _visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; asked in another process, as torch is large."""
    program = "import torch; print(torch.cuda.device_count())"
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    count = int(asked.stdout) if asked.returncode == 0 and asked.stdout.strip().isdecimal() else 0
    named = os.environ.get(GPUS)
    return (named.split(",") if named else [str(i) for i in range(count)])[:count]

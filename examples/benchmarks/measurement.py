"""What the benchmarks share: where a run was made, its clock, its error, and the form of a comparison."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["comparison", "mean", "provenance", "relative_error", "wait"]


def comparison(name: str, unit: str, ours: float, peer: float, peer_name: str, bound: float | None) -> dict[str, Any]:
    """One entry of a result file's "rows", where less is better: a ratio above 1 says that ours is better.

    Args:
        name: What was measured.
        unit: Of both numbers.
        ours: Our number.
        peer: The other one's.
        peer_name: Who the other one is.
        bound: What the number is held to; None for nothing.
    """
    return {
        "name": f"{name} {unit}",
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "ratio": peer / ours if ours else None,
        "bound": bound,
        "unit": unit,
    }


def provenance(device: torch.device, packages: Iterable[str], command: str) -> dict[str, Any]:
    """Hardware, versions, command and commit, as a result file begins."""
    return {
        "hardware": _hardware(device),
        "versions": {name: metadata.version(name) for name in packages},
        "command": command,
        "commit": _commit(),
    }


def mean(values: Iterable[Any]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """L2 distance of two samples over the size of the second."""
    return float((ours - theirs).norm() / theirs.norm())


def wait(device: torch.device) -> None:
    """Returns when the device has done what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{model}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _commit() -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()

"""Whether a batch of points is cheaper than the calls that it replaces."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Cost", "expected_evaluations", "seconds"]


@dataclass(frozen=True)
class Cost:
    """What the model's batch costs, measured on the machine at hand.

    Args:
        single: Seconds of a call for one point.
        sweep: Seconds of a call for `points` points.
        points: In that call; about W.
    """

    single: float
    sweep: float
    points: int

    def speedup(self, steps: int, sweeps: float) -> float:
        """Seconds of `steps` sequential calls over seconds of `sweeps` such ones; below 1, parallel is slower."""
        return steps * self.single / (sweeps * self.sweep)

    def warning(self, steps: int, sweeps: float) -> str:
        return (
            f"parallel sampling will be slower here: a sweep of {self.points} points takes {self.sweep:.3g} s and a "
            f"step {self.single:.3g} s, so a run, as much work as {sweeps:.1f} such sweeps, takes "
            f"{sweeps * self.sweep:.3g} s where {steps} steps take {steps * self.single:.3g} s. Use a larger device or "
            "several, a smaller window, or auto=True, which steps aside by itself"
        )


def expected_evaluations(steps: int) -> float:
    """Points to expect that a run asks the model at, before a first one has shown it: what the digits benchmark needs.

    A run that sees all points at once takes 5 T^0.1 rounds, and half of their points: the others are final by then. A
    window that slides stays full, and needs the rounds again for every second window.
    """
    rounds: float = min(steps, 5 * steps**0.1)
    return rounds * steps / 2


def seconds(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What a call returned and how long it took, the device's queued work included."""
    _wait_for(device)
    start = time.perf_counter()
    result = call()
    _wait_for(device)
    return result, time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Whether a batch of points is cheaper than the calls that it replaces."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Cost", "expected_rounds", "seconds"]


@dataclass(frozen=True)
class Cost:
    """What the model's batch costs, measured on the machine at hand.

    Args:
        single: Seconds of a call for one point.
        sweep: Seconds of a call for `points` points.
        points: W.
    """

    single: float
    sweep: float
    points: int

    def speedup(self, steps: int, rounds: int) -> float:
        """Seconds of `steps` sequential calls over seconds of `rounds` sweeps; below 1, parallel sampling is slower."""
        return steps * self.single / (rounds * self.sweep)

    def warning(self, steps: int, rounds: int) -> str:
        return (
            f"parallel sampling will be slower here: a sweep of {self.points} points takes {self.sweep:.3g} s and "
            f"a step {self.single:.3g} s, so {rounds} sweeps take {rounds * self.sweep:.3g} s where {steps} steps take "
            f"{steps * self.single:.3g} s. Use a larger device or several, a smaller window, or auto=True, which steps "
            "aside by itself"
        )


def expected_rounds(steps: int, window: int) -> int:
    """Rounds to expect before a first run has shown them: what the digits benchmark needs (examples/benchmarks).

    A window that slides needs its share of them again for every window.
    """
    whole: int = min(steps, round(5 * steps**0.1))
    return max(whole, round(whole * steps / (2 * window)))


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

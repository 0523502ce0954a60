"""Whether the way that should be sooner is: both ways on a run's own batches, and back to stock's where it is not."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from forerun.moe.deepspeed_state import State

__all__ = ["Trial"]


class Trial:
    """A model's first calls, each layer run both ways; then all ranks of the group decide alike.

    Stock's way is measured where experts lie by the plan, on batches that it takes: a classic layer's exchange, for
    one, may ask for as many tokens on every rank. Where there was none, ours stays. The answer of a call is ours.

    Args:
        layers: The model's, speculated.
        calls: Of each layer that are run both ways.
        undo: Goes back to stock's way.
    """

    def __init__(self, layers: Sequence[Any], calls: int, undo: Callable[[], None]) -> None:
        self._layers, self._left, self._undo = layers, calls * len(layers), undo
        self._calls = calls
        self._told = torch.zeros(4, dtype=torch.float64)  # seconds our way, stock's; rows our way, stock's

    def both(self, layer: Any, ours: Callable[[], Any], elsewhere: Callable[[], Any], batch: int) -> Any:
        """A layer's answer, found both ways, by turns which comes first: the arguments are those of `answered`."""
        state: State = layer.forerun_state
        device = next(layer.parameters()).device
        self._left -= 1
        ends = torch.tensor([batch, -batch], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MIN, group=layer.ep_group)
        fewest, most = ends[0].item(), -ends[1].item()
        if fewest != most or fewest < 0:
            answer = ours()
            self._decide(layer, device)
            return answer
        mine_first = self._left % 2 == 0
        # A gate may draw random numbers: the first way must not leave the second one others.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            first, spent = self._timed(layer, ours if mine_first else elsewhere, device)
        second, spent_then = self._timed(layer, elsewhere if mine_first else ours, device)
        seconds = (spent, spent_then) if mine_first else (spent_then, spent)
        self._told += torch.tensor([*seconds, *state.rows], dtype=torch.float64)
        self._decide(layer, device)
        return first if mine_first else second

    def _timed(self, layer: Any, way: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
        dist.barrier(layer.ep_group)
        start = time.perf_counter()
        answer = way()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return answer, time.perf_counter() - start

    def _decide(self, layer: Any, device: torch.device) -> None:
        if self._left:
            return
        told = self._told.to(device, torch.float64)
        dist.all_reduce(told, group=layer.ep_group)
        mine, stock, rows, stock_rows = told.tolist()
        for one in self._layers:
            one.forerun_state.trial = None
        if mine < stock or not stock:
            return
        self._undo()
        calls = self._calls * len(self._layers) * dist.get_world_size(layer.ep_group)
        warnings.warn(
            f"forerun: back to DeepSpeed's own exchange: a layer's call took {mine / calls * 1e3:.2f} ms instead of "
            f"{stock / calls * 1e3:.2f} ms over the first {self._calls} calls ({rows:.0f} rows sent instead of "
            f"{stock_rows:.0f})",
            RuntimeWarning,
            stacklevel=2,
        )

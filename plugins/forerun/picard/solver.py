"""The base sampler as a black box: one update per point, its history kept inside."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

__all__ = ["Solver"]


class Solver(Protocol):
    """A sequential sampler that stands at one point of its trajectory.

    The sequential run that every sweep reproduces, given the model's answers:

        for point in range(T):
            output = model(solver.scale(sample, point), point)
            sample = solver.step(output, sample)

    `step` may depend on earlier steps (multistep history) and on random draws, as long as a point's draws do not depend
    on the values that pass through it: a fork that steps again over the same points repeats the same draws.
    """

    dtype: torch.dtype | None  # what samples are cast to after each step; None: as the solver leaves them

    def fork(self) -> Self:
        """An independent copy that stands at the same point."""

    def scale(self, sample: Tensor, point: int) -> Tensor:
        """`[B, ...]` what the model is given for `sample` at `point`; leaves the solver where it stands."""

    def step(self, output: Tensor, sample: Tensor) -> Tensor:
        """`[B, ...]` the sample at the next point; the solver moves there."""

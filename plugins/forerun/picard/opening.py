"""A run's first sweep, which is asked before the run has seen its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.picard.predict import working_dtype

__all__ = ["Opening"]


@dataclass
class Opening:
    """The model's first call of a run, widened to the window (`forerun.picard.denoiser.Sweep`).

    It comes before the scheduler's first `step`: how many samples the pipeline's rows hold is not known yet, and each
    row is taken for itself. Every point starts as the row's own noise at that point's size, which is the trajectory
    that Gaussian data would have.
    """

    points: tuple[int, ...]
    timesteps: Tensor  # [W]
    factors: Tensor  # [W] a point's model input over that of the first point, whose factor is 1
    weights: Sequence[float]  # of the Picard Consistency Model, per point
    shape: torch.Size | None  # of a sample, if `scale_model_input` has shown it
    frontier: Tensor | None = None
    measure: Callable[[float, float], None] | None = None
    opened: torch.Size | None = None  # of a sample that was spread

    @property
    def frontier_timestep(self) -> Tensor:
        return self.timesteps[0]

    def spread(self, sample: Tensor, points: list[int]) -> Tensor:
        self.opened = sample.shape[1:]
        factors = self.factors[points].to(sample.device, working_dtype(sample.dtype))
        return sample[:, None] * factors.reshape(1, -1, *(1,) * (sample.ndim - 1))

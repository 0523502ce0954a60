"""When a point counts as converged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from forerun.picard.levels import NoiseLevels
from forerun.picard.predict import working_dtype

__all__ = ["Norm", "Stopping"]

Norm = Literal["relative", "noise"]


@dataclass(frozen=True)
class Stopping:
    """A point is converged when a sweep changes it by at most `tolerance`, in the chosen norm, for every sample.

    `norm="relative"`: root mean square of the change over that of the point. `norm="noise"`: over the standard
    deviation of the scheduler's noise at that point (ParaDiGMS); one without noise takes the smallest that is not 0.

    Source: arXiv 2305.16317, eq. 11 (`norm="noise"`).
    """

    tolerance: float
    norm: Norm = "relative"

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(
                f"tolerance is {self.tolerance!r}; give a number >= 0 (0 runs until the sequential result is exact)"
            )
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm is {self.norm!r}; give one of {', '.join(get_args(Norm))}")

    def for_dtype(self, dtype: torch.dtype) -> Stopping:
        """The same rule with a tolerance that `dtype` can resolve: its rounding is never mistaken for change."""
        if self.tolerance == 0:
            return self
        return Stopping(max(self.tolerance, 4 * torch.finfo(dtype).eps), self.norm)

    def scale(self, points: slice, samples: Tensor, levels: NoiseLevels | None) -> Tensor:
        """`[W, B]` the size that a change of the `samples` `[W, B, ...]` at `points` is measured against."""
        if self.norm == "relative":
            return _root_mean_square(samples)
        if levels is None:
            raise ValueError("norm='noise' needs the scheduler's noise levels, and this one shows none: use 'relative'")
        floor = levels.sigma[levels.sigma > 0].min()
        sigma = torch.cat([levels.sigma, levels.sigma.new_zeros(1)])[points].clamp(min=float(floor))
        return sigma.to(samples.device, working_dtype(samples.dtype))[:, None].expand(samples.shape[:2])

    def change(self, points: slice, new: Tensor, old: Tensor, levels: NoiseLevels | None) -> Tensor:
        """`[W, B]` change of the points from `old` to `new`, `[W, B, ...]` each; compared with `tolerance`."""
        scale = self.scale(points, new, levels)
        difference = _root_mean_square(new - old)
        return torch.where(difference == 0, difference, difference / scale.clamp(min=torch.finfo(scale.dtype).tiny))


def _root_mean_square(samples: Tensor) -> Tensor:
    return samples.to(working_dtype(samples.dtype)).flatten(2).square().mean(2).sqrt()

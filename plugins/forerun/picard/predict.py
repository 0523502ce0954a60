"""What the model would answer at a point that has moved since it was asked.

A sweep asks the model at the old trajectory and rebuilds a new one. Plain Picard iteration replays the old answers. An
answer corrected for the move makes the rebuild a quasi-Newton step of the same fixed-point equation: the limit and the
exactness of the first points are untouched (a point that does not move is not corrected), only the speed changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from forerun.picard.levels import NoiseLevels

__all__ = ["Frozen", "Guided", "Predictor", "Secant", "working_dtype"]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32: sums over a trajectory in half precision drift by a percent."""
    return torch.promote_types(dtype, torch.float32)


class Predictor(Protocol):
    def observe(self, lo: int, samples: Tensor, outputs: Tensor, guided: Sequence[bool] = ()) -> None:
        """`[W, B, ...]` samples and answers there, for the points from `lo` on; replaces what was known.

        `guided` says whose answers, if any, are not the model's own, so that nothing about it is learned from them.
        """

    def predict(self, point: int, sample: Tensor) -> Tensor:
        """`[B, ...]` answer to expect at an observed point for `sample`."""


class Frozen:
    """Plain Picard iteration: the old answer, whatever the sample.

    Source: arXiv 2305.16317, eq. 6.
    """

    def observe(self, lo: int, samples: Tensor, outputs: Tensor, guided: Sequence[bool] = ()) -> None:
        self._lo, self._outputs = lo, outputs

    def predict(self, point: int, sample: Tensor) -> Tensor:
        return self._outputs[point - self._lo]


class Secant:
    """Answers follow the move by a diagonal slope, learned from the last two sweeps, and a rank-one secant.

    Each element's slope is the least-squares fit of (change of answer) / (change of sample) over neighbouring points,
    drawn towards `levels`' prior where there is little to learn from and kept within its bounds; along the last move
    itself the answer's change is known, and that is added as Broyden's rank-one term. Needs no model call of its own.

    Source: quasi-Newton iteration for parallel-in-time recurrences with diagonal Jacobians, arXiv 2407.19115, sec. 4.1;
    Broyden, A Class of Methods for Solving Nonlinear Simultaneous Equations (1965), eq. 4.5; the prior: levels.py.
    """

    def __init__(self, levels: NoiseLevels | None, *, neighbours: int = 8, prior_weight: float = 0.3) -> None:
        self._levels = levels
        self._neighbours = neighbours  # points on each side that share a slope
        self._prior_weight = prior_weight  # of the prior against the mean evidence of an element
        self._lo = 0
        self._samples: Tensor | None = None
        self._own = torch.zeros(0, dtype=torch.bool)  # whether an answer was the model's own, per observed point

    def observe(self, lo: int, samples: Tensor, outputs: Tensor, guided: Sequence[bool] = ()) -> None:
        own = ~torch.tensor(guided or [False] * len(samples))
        moved, answered = self._moves(lo, samples, outputs, own)
        self._lo, self._samples, self._outputs, self._own = lo, samples, outputs, own
        self._fit(moved, answered)

    def predict(self, point: int, sample: Tensor) -> Tensor:
        index = point - self._lo
        assert self._samples is not None
        move = sample.to(self._slope.dtype) - self._samples[index]
        along = (move * self._direction[index]).flatten(1).sum(1)
        correction = self._slope[index] * move + self._rest[index] * _column(along, move.ndim)
        return self._outputs[index] + correction.to(self._outputs.dtype)

    def _moves(self, lo: int, samples: Tensor, outputs: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """`[W, B, ...]` twice: change of sample and of answer since the last observation.

        0 where there is nothing to compare: at new points, and where one of the answers is not the model's own.
        """
        dtype = working_dtype(samples.dtype)
        moved = torch.zeros(samples.shape, dtype=dtype, device=samples.device)
        answered = torch.zeros_like(moved)
        if self._samples is not None and self._samples.shape[1:] == samples.shape[1:]:
            skip = lo - self._lo
            shared = min(len(self._samples) - skip, len(samples))
            if skip >= 0 and shared > 0:
                moved[:shared] = samples[:shared].to(dtype) - self._samples[skip : skip + shared]
                answered[:shared] = outputs[:shared].to(dtype) - self._outputs[skip : skip + shared]
                others = (~(own[:shared] & self._own[skip : skip + shared])).nonzero().flatten().tolist()
                moved[others], answered[others] = 0, 0
        return moved, answered

    def _fit(self, moved: Tensor, answered: Tensor) -> None:
        """Slopes and the rank-one rest, all `[W, B, ...]`."""
        slope = _moving_sum(moved * answered, self._neighbours)
        evidence = _moving_sum(moved.square(), self._neighbours)
        prior_weight = self._prior_weight * evidence.flatten(2).mean(2)
        prior_weight = _column(prior_weight + torch.finfo(moved.dtype).tiny, moved.ndim)
        assert self._samples is not None
        points = slice(self._lo, self._lo + len(moved))
        if self._levels is None:
            slope = slope / (evidence + prior_weight)
        else:
            prior = self._along_window(self._levels.output_slope[points], moved)
            slope = (slope + prior_weight * prior) / (evidence + prior_weight)
            lowest, highest = (self._along_window(bound[points], moved) for bound in self._levels.slope_bounds)
            slope = slope.clamp(lowest, highest)
        # A move of the size of rounding has no direction to learn from.
        rounding = (10 * torch.finfo(moved.dtype).eps) ** 2 * self._samples.to(moved.dtype).square().flatten(2).sum(2)
        length = moved.square().flatten(2).sum(2) + rounding + torch.finfo(moved.dtype).tiny
        self._slope = slope
        self._direction = moved / _column(length, moved.ndim)
        self._rest = answered - slope * moved

    @staticmethod
    def _along_window(values: Tensor, like: Tensor) -> Tensor:
        return _column(values.to(device=like.device, dtype=like.dtype), like.ndim)


class Guided:
    """A sweep that a Picard Consistency Model answers in part: its answers follow a move as Gaussian data's would.

    That is what it is trained to be right under (`forerun.picard.objective`); the base model's follow `own`.

    Args:
        own: Predicts the base model's answers.
        levels: Noise levels of the points.
        weights: `[W]` of the PCM in the answers to observe.
    """

    def __init__(self, own: Predictor, levels: NoiseLevels, weights: Sequence[float]) -> None:
        self._own, self._levels, self._weights = own, levels, weights

    def observe(self, lo: int, samples: Tensor, outputs: Tensor, guided: Sequence[bool] = ()) -> None:
        self._own.observe(lo, samples, outputs, [weight > 0 for weight in self._weights])
        self._lo, self._samples, self._outputs = lo, samples, outputs

    def predict(self, point: int, sample: Tensor) -> Tensor:
        index = point - self._lo
        weight = self._weights[index]
        if weight == 0:
            return self._own.predict(point, sample)
        answer = self._outputs[index] + float(self._levels.output_slope[point]) * (sample - self._samples[index])
        return answer if weight == 1 else torch.lerp(self._own.predict(point, sample), answer, weight)


def _column(values: Tensor, ndim: int) -> Tensor:
    """`values` with trailing axes of size 1 up to `ndim`."""
    return values.reshape(*values.shape, *(1,) * (ndim - values.ndim))


def _moving_sum(values: Tensor, reach: int) -> Tensor:
    """Sum over the points at most `reach` away, along the first axis."""
    padded = torch.nn.functional.pad(values.cumsum(0), (0, 0) * (values.ndim - 1) + (1, 0))
    index = torch.arange(len(values), device=values.device)
    return padded[(index + reach + 1).clamp(max=len(values))] - padded[(index - reach).clamp(min=0)]

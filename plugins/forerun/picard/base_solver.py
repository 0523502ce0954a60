"""A diffusers scheduler as a `Solver`: its own `step` is the update, its attributes are the state."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from forerun.picard.draws import Draws
from forerun.picard.levels import DATA_VARIANCE, NoiseLevels

__all__ = ["BaseScheduler", "SchedulerSolver", "fresh_solver", "input_factors", "noise_levels"]

BaseScheduler = Any  # any diffusers scheduler: its classes share no type that names `step`


class SchedulerSolver:
    """Steps a copy of a diffusers scheduler over the points of one run.

    Args:
        scheduler: After `set_timesteps`, before the first `step`. Copied, never changed.
        timesteps: `[T]` the run's timesteps.
        arguments: What the pipeline gives every `step` besides output, timestep and sample.
        draws: Where random numbers come from.
        mirrored: The pipeline keeps two copies of each sample in the batch and feeds the first back to both (DiT).
    """

    def __init__(
        self,
        scheduler: BaseScheduler,
        timesteps: Tensor,
        arguments: Mapping[str, Any],
        draws: Draws,
        *,
        mirrored: bool = False,
    ) -> None:
        self._scheduler = _copy(scheduler)
        self._scheduler.timesteps = torch.as_tensor(
            scheduler.timesteps
        ).cpu()  # looking up a device's would wait for it
        if hasattr(scheduler, "is_scale_input_called"):
            self._scheduler.is_scale_input_called = True
        if hasattr(scheduler, "get_lms_coefficient"):  # a numerical integral, the same in every sweep
            self._scheduler.get_lms_coefficient = cache(self._scheduler.get_lms_coefficient)
        self._timesteps = timesteps.cpu()
        self._arguments = dict(arguments)
        self._draws = draws
        self._mirrored = mirrored
        self._point = 0
        self._earlier: Tensor | None = None  # CogVideoX DPM: the last clean image, which its pipeline carries
        self.dtype: torch.dtype | None = None  # what the pipeline casts samples to between steps; None: it does not
        parameters = inspect.signature(type(scheduler).step).parameters
        self._draws_given = "generator" in parameters
        self._carries = "old_pred_original_sample" in parameters
        self._scaler = _copy(self._scheduler)
        self._origin = _scaling_origin(self._scaler, self._timesteps[0])

    def fork(self) -> Self:
        fork = object.__new__(type(self))
        fork.__dict__.update(self.__dict__)
        fork._scheduler = _copy(self._scheduler)
        return fork

    def scale(self, sample: Tensor, point: int) -> Tensor:
        if self._mirrored:
            sample = _mirror(sample)
        if not hasattr(self._scaler, "scale_model_input"):
            return sample
        if self._origin is not None:
            self._scaler._step_index = self._origin + point
        scaled: Tensor = self._scaler.scale_model_input(sample, self._timesteps[point])
        return scaled

    def step(self, output: Tensor, sample: Tensor) -> Tensor:
        arguments = dict(self._arguments)
        if self._draws_given:
            arguments["generator"] = self._draws.at(self._point)
        if self._mirrored:
            sample = _mirror(sample)
        timestep = self._timesteps[self._point]
        if self._carries:
            before = self._timesteps[self._point - 1] if self._point > 0 else None
            result = self._scheduler.step(output, self._earlier, timestep, before, sample, **arguments)
            self._earlier = result[1]
        else:
            result = self._scheduler.step(output, timestep, sample, **arguments)
        self._draws.drawn(self._point)
        self._point += 1
        self.result = result  # of the last step, in the base scheduler's own form
        after: Tensor = result[0]
        return after if self.dtype is None else after.to(self.dtype)


def noise_levels(
    scheduler: BaseScheduler, timesteps: Tensor, data_variance: float = DATA_VARIANCE
) -> NoiseLevels | None:
    """`[T]` noise levels, read off the scheduler's own `add_noise` (off its timesteps for flow matching).

    None where the scheduler's prediction type is not known.
    """
    probe = _rewound(scheduler)
    timesteps = timesteps.cpu()
    probe.timesteps = torch.as_tensor(probe.timesteps).cpu()
    one = torch.ones(len(timesteps), dtype=torch.float64)
    if hasattr(probe, "add_noise"):
        alpha, sigma = probe.add_noise(one, 0 * one, timesteps), probe.add_noise(0 * one, one, timesteps)
    else:  # flow matching: a timestep is its noise level
        sigma = timesteps.double() / scheduler.config.num_train_timesteps
        alpha = 1 - sigma
    total = (alpha**2 + sigma**2).sqrt()  # 1 for variance-preserving schedules
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if hasattr(probe, "precondition_outputs"):
        keep = torch.stack([probe.precondition_outputs(one[0], 0 * one[0], s) for s in sigma])
        gain = torch.stack([probe.precondition_outputs(0 * one[0], one[0], s) for s in sigma])
    elif kind == "epsilon":
        keep, gain = 1 / alpha, -sigma / alpha
    elif kind == "v_prediction":
        keep, gain = alpha / total**2, -sigma / total
    elif kind == "sample":
        keep, gain = 0 * one, one
    elif kind == "flow_prediction":
        keep, gain = one, -sigma
    else:
        return None
    return NoiseLevels(alpha.double(), sigma.double(), keep.double(), gain.double(), data_variance)


def input_factors(scheduler: BaseScheduler, timesteps: Tensor) -> Tensor:
    """`[T]` what the scheduler multiplies a sample by before the model is given it."""
    solver = fresh_solver(scheduler, timesteps)
    one = torch.ones(1, dtype=torch.float64)
    return torch.cat([solver.scale(one, point) for point in range(len(timesteps))])


def fresh_solver(scheduler: BaseScheduler, timesteps: Tensor) -> SchedulerSolver:
    """A solver at point 0, outside of a pipeline: default arguments, torch's own draws."""
    return SchedulerSolver(_rewound(scheduler), timesteps, {}, Draws(None, torch.device("cpu")))


def _rewound(scheduler: BaseScheduler) -> BaseScheduler:
    """A copy that stands at no step yet."""
    copy = _copy(scheduler)
    for name in ("_begin_index", "_step_index"):
        if hasattr(copy, name):
            setattr(copy, name, None)
    return copy


def _copy(scheduler: BaseScheduler) -> BaseScheduler:
    """A copy whose history can be changed without a trace in the original; schedules and config are shared."""
    copy = object.__new__(type(scheduler))
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            value = list(value)
        elif isinstance(value, Tensor) and value.ndim > 1:  # samples and outputs; some are added to in place
            value = value.clone()
        copy.__dict__[name] = value
    return copy


def _scaling_origin(scheduler: BaseScheduler, first: Tensor) -> int | None:
    """The scheduler's index of the first timestep; None where scaling does not go by an index."""
    if not hasattr(scheduler, "scale_model_input"):
        return None
    scheduler.scale_model_input(torch.zeros(1), first)
    origin: int | None = getattr(scheduler, "_step_index", None)
    return origin


def _mirror(sample: Tensor) -> Tensor:
    half = sample[: len(sample) // 2]
    return torch.cat([half, half])

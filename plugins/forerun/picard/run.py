"""One run of a pipeline's loop: each turn of the loop is a sweep."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from forerun.picard.base_solver import BaseScheduler, SchedulerSolver, input_factors, noise_levels
from forerun.picard.cost import Cost, expected_evaluations
from forerun.picard.denoiser import Sweep
from forerun.picard.draws import Draws
from forerun.picard.levels import DATA_VARIANCE, NoiseLevels
from forerun.picard.opening import Opening
from forerun.picard.options import Options
from forerun.picard.ranks import PointRanks
from forerun.picard.report import Report
from forerun.picard.switch import Guide, Switch
from forerun.picard.window import Window

__all__ = ["Memory", "Run", "Setting"]


@dataclass(frozen=True)
class Setting:
    """What a run knows of the pipeline around it."""

    widened: bool  # a denoiser hook widens the model's calls; else the pipeline itself is fed the window as its batch
    mirrored: bool = False  # each sample stands twice in the batch (DiT)
    cuts: tuple[int, ...] = ()  # points at which a sweep has to end
    ranks: PointRanks | None = None
    switch: Switch | None = None  # of the Picard Consistency Model, where there is one
    data_variance: float = DATA_VARIANCE
    guidance: Callable[[], Mapping[str, Any]] = dict  # what must not change while the loop runs


@dataclass
class Memory:
    """What one run leaves for the next."""

    evaluations: dict[tuple[int, int], int] = field(default_factory=dict)  # that (steps, window) took
    cost: dict[tuple[int, int], Cost] = field(default_factory=dict)  # by window and batch
    trajectory: Tensor | None = None  # [T + 1, B, ...], kept for a warm start
    report: Report | None = None


@dataclass
class _Sweep:
    """The sweep that is being asked, as `forerun.picard.denoiser.Sweep` wants it."""

    points: tuple[int, ...]
    timesteps: Tensor
    inputs: Tensor  # [W, B, ...]
    frontier: Tensor
    frontier_timestep: Tensor
    weights: Sequence[float]
    measure: Callable[[float, float], None] | None

    @property
    def shape(self) -> torch.Size:
        return self.inputs.shape[2:]

    def spread(self, sample: Tensor, points: list[int]) -> Tensor:
        rows = self.inputs[points].transpose(0, 1)
        return rows.repeat(len(sample) // len(rows), *(1,) * (rows.ndim - 1))


class Run:
    """Drives one loop over `timesteps`.

    Args:
        base: The scheduler as `set_timesteps` left it; copied, never changed.
        timesteps: `[T]` of this loop.
        options: The user's choices.
        setting: The pipeline around the loop.
        memory: What earlier runs left; this run adds to it.
    """

    def __init__(
        self, base: BaseScheduler, timesteps: Tensor, options: Options, setting: Setting, memory: Memory
    ) -> None:
        self._base = base
        self._timesteps = timesteps
        self._options = options
        self._setting = setting
        self._memory = memory
        self._window: Window[SchedulerSolver] | None = None
        self._opening: Opening | None = None
        self._sweep: _Sweep | None = None
        self._shape: torch.Size | None = None  # of a sample, once `scale` has seen one
        self._size = min(options.window or self.points, self.points)
        self._turns = 0
        self._started = time.perf_counter()
        self._measured, self._measured_points = [0.0, 0.0], 0
        self._stepped_aside = False
        self.active = True

    @property
    def points(self) -> int:
        return len(self._timesteps)

    def turns(self) -> Iterator[Tensor]:
        """What the loop is given, one timestep (or one per row of the window) a turn; never more than T turns."""
        try:
            while self.active and self._turns < self.points:
                self._turns += 1
                self._check_guidance()
                yield self._now()
        finally:
            if self.active and self._window is not None:
                self._finish("interrupted")
            self.active = False
            self._window = self._opening = self._sweep = None  # the trajectory is let go with the loop

    def drives(self, timestep: Any) -> bool:
        """Whether the loop that calls `step(timestep=…)` is this run's own."""
        if not self.active:
            return False
        if self._window is None:  # a loop that only looks at the timesteps has turned more than once by now
            return self._turns == 1 and float(torch.as_tensor(timestep).flatten()[0]) == float(self._timesteps[0])
        return True

    def sweep(self) -> Sweep | None:
        """The sweep to ask the model about; None while the model is to be called as the pipeline calls it."""
        if not self.active:
            return None
        if self._window is None:
            self._opening = self._opening or self._open()
            return self._opening
        if self._sweep is None:
            self._sweep = self._next(self._window)
        return self._sweep

    def _next(self, window: Window[SchedulerSolver]) -> _Sweep:
        points, lo, measured = window.asked, window.lo, self._wants_cost(window)
        self._measured_points = len(points) if measured else 0
        return _Sweep(
            points=points,
            timesteps=self._timesteps[list(points)],
            inputs=window.inputs,
            frontier=window.solver.scale(window.frontier, lo),
            frontier_timestep=self._timesteps[lo],
            weights=window.weights,
            measure=self._measure if measured else None,
        )

    def _open(self) -> Opening | None:
        """The first sweep, where a run can begin with one; None where it begins with the first point alone."""
        laid = self._options.coarse > 1 or (self._options.warm_start and self._memory.trajectory is not None)
        if not self._setting.widened or self._turns > 1 or laid or self._known_slower():
            return None
        levels = self._levels
        if levels is None or not levels.from_noise:
            return None
        points = tuple(range(min(self._size, *self._setting.cuts, self.points)))
        factors = levels.size[:-1] * input_factors(self._base, self._timesteps)
        return Opening(
            points=points,
            timesteps=self._timesteps[: len(points)],
            factors=(factors / factors[0])[: len(points)],
            weights=() if self._guide is None else self._guide.weights(points),
            shape=self._shape,
        )

    @cached_property
    def _guide(self) -> Guide | None:
        switch, levels = self._setting.switch, self._levels
        if switch is None or levels is None:
            return None
        return Guide(switch, levels)

    @cached_property
    def _levels(self) -> NoiseLevels | None:
        return noise_levels(self._base, self._timesteps, self._setting.data_variance)

    def scale(self, sample: Tensor, unscaled: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`scale_model_input` of the running loop."""
        window = self._window
        if window is None:
            self._shape = sample.shape[1:]
            return unscaled(sample, self._timesteps[0])
        if self._setting.widened:
            return window.solver.scale(sample, window.lo)
        return window.inputs.transpose(0, 1).flatten(0, 1).to(sample.dtype)

    def step(self, output: Tensor, sample: Tensor, arguments: Mapping[str, Any]) -> Any:
        """`step` of the running loop: takes the model's answers, returns what the base scheduler's step returns."""
        if self._window is None:
            self._begin(output, sample, arguments)
        else:
            self._check_unchanged(sample)
            self._window.update(self._by_point(output, len(self._window.asked)))
        self._sweep = None
        self._step_aside_if_slower()
        window = self._window
        assert window is not None
        if window.done:
            self._finish(self._how_it_ended(window))
        if window.done or self._setting.widened:
            returned = window.frontier.clone()  # a callback may write into it
        else:
            returned = window.samples[[point - window.lo for point in window.asked]].transpose(0, 1).flatten(0, 1)
        self._returned, self._version = returned, _version(returned)
        return _with_sample(window.solver.result, returned)

    def _now(self) -> Tensor:
        window = self._window
        if window is None:
            return self._timesteps[min(self._turns, self.points) - 1]
        if self._setting.widened:
            return self._timesteps[window.lo]
        return self._timesteps[list(window.asked)].repeat(len(window.frontier))

    def _begin(self, output: Tensor, sample: Tensor, arguments: Mapping[str, Any]) -> None:
        arguments = dict(arguments)
        generator = arguments.pop("generator", None)
        if getattr(self._base, "noise_sampler", 0) is None and generator is None:  # it would seed itself, once
            generator = torch.Generator().manual_seed(int(torch.randint(0, 2**63 - 1, ())))
        self._draws = Draws(generator, sample.device)
        solver = SchedulerSolver(self._base, self._timesteps, arguments, self._draws, mirrored=self._setting.mirrored)
        ranks = self._setting.ranks
        if ranks is not None:
            ranks.assert_same_start(sample)
        guess = self._memory.trajectory if self._options.warm_start else None
        if guess is not None and (guess.shape != (self.points + 1, *sample.shape) or guess.dtype != sample.dtype):
            guess = None
        self._guidance = dict(self._setting.guidance())
        opening = self._opening
        opened = opening is not None and opening.opened == sample.shape[1:]
        self._stepped_aside = self._known_slower(len(sample))
        self._warm_after = 1 if opened else self._options.coarse + 1
        self._window = Window(
            solver,
            sample,
            self.points,
            self._options.stopping().for_dtype(sample.dtype),
            size=1 if self._stepped_aside else self._size,
            acceleration=self._options.acceleration,
            levels=self._levels,
            coarse=self._options.coarse,
            guess=guess,
            alone=not opened,
            cuts=self._setting.cuts,
            keep=self._options.warm_start,
            guide=self._guide,
            rounds=self._options.sweeps,
            agree=None if ranks is None else ranks.slowest,
        )
        answers = self._by_point(output, len(opening.points) if opening is not None and opening.opened else 1)
        self._window.update(answers if opened else answers[:1])

    def _check_unchanged(self, sample: Tensor) -> None:
        """Raises ValueError if the loop did not hand back what the last step returned."""
        assert self._window is not None
        if sample is not self._returned or _version(sample) != self._version:
            if sample.dtype != self._returned.dtype:  # the pipeline casts between steps: so does every sweep from now
                self._window.cast(sample.dtype)
            same = sample is not self._returned and sample.shape == self._returned.shape
            if not same or not torch.equal(sample, self._returned.to(sample.dtype)):
                raise ValueError(
                    "the latents were changed between steps (by the pipeline or a callback), which parallel sampling "
                    "cannot serve: a sweep has evaluated points that no longer exist; run it with scheduler.detach()"
                )

    def _check_guidance(self) -> None:
        """Raises ValueError if a callback changed the pipeline's guidance."""
        if self._window is None:
            return
        guidance = dict(self._setting.guidance())
        if guidance != self._guidance:
            changed = sorted(name for name in guidance if guidance[name] != self._guidance.get(name))
            raise ValueError(
                f"{', '.join(changed)} changed between steps (by a callback?): a sweep evaluates all points with one "
                "guidance; run it with scheduler.detach()"
            )

    def _by_point(self, output: Tensor, points: int) -> Tensor:
        """`[W, B, ...]` the model's answers, from the `[B, W]` rows that the pipeline's guidance left."""
        assert self._window is not None
        batch = len(self._window.frontier)
        if len(output) != points * batch:
            raise ValueError(
                f"step got {len(output)} rows of model output for {points} points of a batch of {batch}: the model was "
                "not asked about the window. A pipeline's denoiser is bound by PicardScheduler.from_pipe(pipe), a bare "
                "loop's by forerun.picard.diffusers.parallel(model, scheduler)"
            )
        by_sample: Tensor = output.unflatten(0, (batch, points))
        return by_sample.transpose(0, 1)

    def _wants_cost(self, window: Window[SchedulerSolver]) -> bool:
        """Measured once for a shape, on a sweep that the base model alone answers, and has seen one like it before.

        That is nearly a full one, so that what a call costs whatever its rows weighs as it does in most sweeps.
        """
        options, points = self._options, len(window.asked)
        if not (options.check_cost or options.auto) or self._key(len(window.frontier)) in self._memory.cost:
            return False
        warm = window.rounds - window.guided_rounds >= self._warm_after
        return warm and not any(window.weights) and points > 1 and 2 * points >= self._size

    def _key(self, batch: int) -> tuple[int, int]:
        return (self._size, batch)

    def _measure(self, single: float, sweep: float) -> None:
        self._measured[0] += single
        self._measured[1] += sweep

    def _known_slower(self, batch: int | None = None) -> bool:
        """Whether a run before (of this batch, or of any) showed that stepping aside is faster, and it may (`auto`)."""
        costs = self._memory.cost.items() if self._options.auto else ()
        fitting = (cost for (size, rows), cost in costs if size == self._size and batch in (rows, None))
        return any(cost.speedup(self.points, self._expected(cost)) < 1 for cost in fitting)

    def _expected(self, cost: Cost) -> float:
        """Work of a run, in sweeps like the one that was measured."""
        known = self._memory.evaluations.get((self.points, self._size))
        return (known or expected_evaluations(self.points)) / cost.points

    def _step_aside_if_slower(self) -> None:
        """After the measured sweep: says that parallel sampling is slower here, or steps aside."""
        if not self._measured[1]:
            return
        assert self._window is not None
        measured = torch.tensor(self._measured, dtype=torch.float64)
        if self._setting.ranks is not None:  # all ranks decide by the slowest one's clock, or they would part ways
            measured = self._setting.ranks.slowest(measured.to(self._window.frontier.device))
        single, sweep = measured.tolist()
        cost = Cost(single, sweep, self._measured_points)
        self._measured = [0.0, 0.0]
        self._memory.cost[self._key(len(self._window.frontier))] = cost
        if cost.speedup(self.points, self._expected(cost)) >= 1:
            return
        if self._options.auto:
            self._stepped_aside = True
            self._window.narrow(1)
        else:
            warnings.warn(cost.warning(self.points, self._expected(cost)), stacklevel=5)

    def _how_it_ended(self, window: Window[SchedulerSolver]) -> str:
        if window.ended_early:
            return "approximate"
        return "exact" if self._options.tolerance == 0 else "converged"

    def _finish(self, stopped: Any) -> None:
        window = self._window
        assert window is not None
        self.active = False
        if stopped != "interrupted":
            self._draws.hand_back()
            if self._options.warm_start:
                self._memory.trajectory = window.trajectory
            if not self._stepped_aside:
                self._memory.evaluations[self.points, self._size] = window.evaluations
        if self._stepped_aside and stopped != "interrupted":
            stopped = "stepped aside"
        cost = self._memory.cost.get(self._key(len(window.frontier)))
        self._memory.report = Report(
            scheduler=type(self._base).__name__,
            points=self.points,
            window=self._size,
            tolerance=window.stopping.tolerance,
            acceleration=self._options.acceleration,
            rounds=window.rounds,
            evaluations=window.evaluations,
            seconds=time.perf_counter() - self._started,
            residuals=tuple(window.residuals),
            residual=window.residual,
            stopped=stopped,
            fell_back=window.fell_back,
            guided_rounds=window.guided_rounds,
            cost=None if cost is None else {"single": cost.single, "sweep": cost.sweep, "points": cost.points},
        )


def _version(tensor: Tensor) -> int | None:
    """Counts writes into a tensor; None where torch does not count them."""
    return None if tensor.is_inference() else tensor._version


def _with_sample(result: Any, sample: Tensor) -> Any:
    """A step's result with another sample, in the base scheduler's own form."""
    if isinstance(result, tuple) and not hasattr(result, "to_tuple"):
        return (sample, *result[1:])
    return type(result)(**{**result, "prev_sample": sample})

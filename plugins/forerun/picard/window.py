"""The sweeps: which points to evaluate next, the rebuild from the answers, what is accepted, where the window goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from forerun.picard.anderson import Anderson
from forerun.picard.levels import NoiseLevels
from forerun.picard.predict import Frozen, Guided, Predictor, Secant, working_dtype
from forerun.picard.solver import Solver
from forerun.picard.stopping import Stopping
from forerun.picard.switch import Guide

__all__ = ["Acceleration", "Window"]

Acceleration = Literal["secant", "anderson", "none"]

S = TypeVar("S", bound=Solver)

# A rebuild this many times as large as the trajectory before it is a failed acceleration. (Plain iteration may
# overshoot too, and comes back: it is exact one point further with every sweep.)
_DIVERGED = 100.0

# A point that leaves the window early keeps its error, which grows on the way to the end: it is held to this share of
# the tolerance. (Digits, T = 100: without it a sample in ten ends up to four times beyond the tolerance.)
_FREEZE = 0.35

# A PCM whose sample is this many times as large as data and noise make one has answered nonsense.
_IMPLAUSIBLE = 3.0

Answer = Callable[[int, Tensor], Tensor]  # (point, sample [B, ...]) -> the model's answer there, [B, ...]


class Window(Generic[S]):
    """A trajectory of T points that is iterated to the sequential result, at most W points at a time.

    Sequential equivalent, and the result at `tolerance=0`:

        for point in range(T):
            sample = solver.step(model(solver.scale(sample), point), sample)

    Use: while not `done`, evaluate the model on `inputs` (for the points in `asked`) and give the answers to `update`.

    Args:
        solver: The base sampler, standing at point 0. Not changed.
        start: `[B, ...]` sample at point 0.
        points: T.
        stopping: When a point counts as converged.
        size: W, at most this many points in a sweep; None for all.
        acceleration: "secant", "anderson" or "none" (plain Picard iteration).
        levels: Noise levels of the points, where known.
        coarse: Model calls, one after the other, that lay a first trajectory before the first sweep (ParaSolver and
            Parareal start so), each with the window's first point beside it. The first of them is the call at point 0
            that every run begins with.
        guess: `[T + 1, B, ...]` an earlier trajectory to start from (warm start).
        alone: Ask for point 0 alone first. False: for the whole window from the first round on, which starts from the
            guess or, without one, from the trajectory that Gaussian data would have (`NoiseLevels.size`).
        cuts: Points at which a sweep has to end (the model changes there).
        keep: Keep every accepted sample, for `trajectory`.
        guide: Which points a Picard Consistency Model answers. Whatever it answers, a point is accepted only by a sweep
            in which the base model answered it and all before it. Needs levels.
        rounds: End after so many rounds with the trajectory as it is then, which is approximate; None: when converged.
        agree: Makes one of the ranks' own sizes `[W + 1]`, where several iterate the same window.

    Raises:
        ValueError: A size, count or shape that does not fit.

    Source: arXiv 2305.16317, algorithm 1; coarse start: arXiv 2405.15986 (SRDS), algorithm 1.
    """

    def __init__(
        self,
        solver: S,
        start: Tensor,
        points: int,
        stopping: Stopping,
        *,
        size: int | None = None,
        acceleration: Acceleration = "secant",
        levels: NoiseLevels | None = None,
        coarse: int = 1,
        guess: Tensor | None = None,
        alone: bool = True,
        cuts: Sequence[int] = (),
        keep: bool = False,
        guide: Guide | None = None,
        rounds: int | None = None,
        agree: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if size is not None and size < 1:
            raise ValueError(f"window is {size}; give at least 1 point, or None for all {points}")
        if acceleration not in get_args(Acceleration):
            raise ValueError(f"acceleration is {acceleration!r}; give one of {', '.join(get_args(Acceleration))}")
        if coarse < 1:
            raise ValueError(f"coarse is {coarse}; give the number of calls, 1 for no coarse start")
        if guess is not None and guess.shape != (points + 1, *start.shape):
            raise ValueError(
                f"the earlier trajectory is {list(guess.shape)}; this run needs {[points + 1, *start.shape]}"
            )
        if guide is not None and levels is None:
            raise ValueError("a Picard Consistency Model needs a scheduler that shows its noise levels")
        if rounds is not None and (rounds < 1 or (size or points) < points or cuts):
            raise ValueError("a number of rounds needs at least 1, and a window of all points")
        self.points = points
        self.stopping = stopping
        self.lo = 0
        self.rounds = 0
        self.evaluations = 0
        self.residuals: list[float] = []
        self.residual = 0.0  # largest change of an accepted sample that the model was asked at, in the sweep before
        self.fell_back = False
        self.guided_rounds = 0
        self.ended_early = False
        self._guide = guide
        self._most_rounds = rounds
        self._size = size or points
        self._cuts = (*sorted(cuts), points)
        self._levels = levels
        self._predictor: Predictor = Secant(levels) if acceleration == "secant" else Frozen()
        self._anderson = Anderson() if acceleration == "anderson" else None
        self._guess = guess
        self._agree = agree
        self._kept: list[Tensor] | None = [] if keep else None
        self.solver = solver.fork()  # stands at lo
        self._ahead = solver.fork()  # stands at the last of _samples
        self._samples = [start]  # of the points lo, lo + 1, ...
        self._answered: tuple[int, Tensor, Tensor] | None = None  # the last answered point, its sample and answer
        reach = self._reach(0)
        self._to_lay = (
            [] if guess is not None else [round(index * reach / coarse) for index in range(1, min(coarse, reach))]
        )
        self._laying = alone
        if not alone and guess is None:
            if levels is None:
                raise ValueError("a first sweep over the whole window needs a guess or noise levels to start from")
            sizes = (levels.size / levels.size[0]).tolist()
            self._samples += [start * sizes[point] for point in range(1, reach + 1)]
        elif not alone:
            self._extend_to(reach)

    @property
    def done(self) -> bool:
        return self.lo >= self.points

    @property
    def frontier(self) -> Tensor:
        """`[B, ...]` the last accepted sample; the result once `done`."""
        return self._samples[0]

    @property
    def samples(self) -> Tensor:
        """`[W + 1, B, ...]` the trajectory as it stands, from the last accepted point on."""
        return torch.stack(self._samples)

    @property
    def trajectory(self) -> Tensor:
        """`[T + 1, B, ...]` every sample of the finished run (with `keep`)."""
        assert self._kept is not None
        assert self.done
        return torch.stack([*self._kept, self.frontier])

    @property
    def asked(self) -> tuple[int, ...]:
        """The points to evaluate next; the first is always the window's own, whose answer makes the next one final."""
        last = self.lo + len(self._samples) - 1
        if self._laying:
            return (self.lo, last) if last > self.lo else (last,)
        return tuple(range(self.lo, last))

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the Picard Consistency Model in the answers to give at the points `asked`; 0 is the base model's own."""
        if self._guide is None or self._laying:
            return (0.0,) * len(self.asked)
        return self._guide.weights(self.asked)

    @property
    def inputs(self) -> Tensor:
        """`[len(asked), B, ...]` what the model is to be given."""
        return torch.stack([self.solver.scale(self._samples[point - self.lo], point) for point in self.asked])

    def update(self, outputs: Tensor) -> None:
        """Takes the model's answers `[len(asked), B, ...]` to `inputs`; accepts what has converged, moves the window.

        Raises:
            ValueError: As many answers as points were not given.
        """
        if len(outputs) != len(self.asked):
            raise ValueError(f"{len(outputs)} answers came for {len(self.asked)} points")
        self.rounds += 1
        self.evaluations += len(self.asked)
        if self._laying:
            self._lay(outputs)
        else:
            self._sweep(outputs, self.weights)
        if self.rounds == self._most_rounds and not self.done:
            self._end_here()

    def narrow(self, size: int) -> None:
        """Goes on with a window of `size` points; 1 is the sequential run."""
        self._size = size
        if not self._laying:
            self._samples = self._samples[: size + 1]

    def cast(self, dtype: torch.dtype) -> None:
        """Goes on in `dtype`: the loop around casts samples between steps, so every step of a sweep has to."""
        self.solver.dtype = dtype
        self._samples = [sample.to(dtype) for sample in self._samples]

    def _reach(self, lo: int) -> int:
        """The point that a window from `lo` ends before."""
        return min(lo + self._size, next((cut for cut in self._cuts if cut > lo), self.points))

    def _lay(self, outputs: Tensor) -> None:
        """The answer at the trajectory's end, before the first sweep: it is laid on from there."""
        self._answered = (self.asked[-1], self._samples[-1], outputs[-1])
        self._samples.append(self._ahead.step(outputs[-1], self._samples[-1]))
        self._samples[1] = self.solver.step(outputs[0], self._samples[0])
        self._drop(1)
        self._laying = bool(self._to_lay)
        self._extend_to(self._to_lay.pop(0) if self._to_lay else self._reach(self.lo))

    def _sweep(self, outputs: Tensor, weights: Sequence[float]) -> None:
        """The answers at every point of the window: it is rebuilt, what has converged is accepted, the rest slides."""
        points, old, own = self.asked, self.samples, _leading_zeros(weights)
        guided = own < len(points)
        predictor = self._predictor
        if guided:
            assert self._levels is not None
            # Plain iteration would carry the answers before the PCM's to other places than it was trained at.
            base = predictor if isinstance(predictor, Secant) else Secant(self._levels)
            predictor = Guided(base, self._levels, weights)
        rebuilt, change, growth, size = self._rebuild(predictor, old, outputs)
        if guided and not size < _IMPLAUSIBLE:
            self._refuse_guide(outputs[:own])
            return
        if not guided and not growth < _DIVERGED and not isinstance(predictor, Frozen):
            self._predictor = predictor = Frozen()
            self.fell_back = True
            rebuilt, change, *_ = self._rebuild(predictor, old, outputs)
        self._residuals(max(change), points, guided)
        accepted = self._accepted(change[:own])
        self.residual = max(self.residual, *change[: accepted - 1], 0.0)
        _roll(self.solver, old[0], points[:accepted], predictor.predict)  # so that the history at lo is theirs
        if self._anderson is not None and guided:
            self._anderson = Anderson()  # its history is the base model's
        elif self._anderson is not None:
            mixed = self._anderson.mix(self.lo + 1, old[1:], torch.stack(rebuilt))
            rebuilt = [*rebuilt[:accepted], *mixed[accepted:].unbind()]
        self._answered = (points[-1], old[-2], outputs[-1])
        self._samples[1:] = rebuilt
        self._drop(accepted)
        if not self.done:
            self._extend_to(self._reach(self.lo))

    def _rebuild(
        self, predictor: Predictor, old: Tensor, outputs: Tensor
    ) -> tuple[list[Tensor], list[float], float, float]:
        """Samples after the window's start, how much each changed, all have grown, and are too large for their noise.

        The sweep's one host sync.
        """
        predictor.observe(self.lo, old[:-1], outputs)
        self._ahead = self.solver.fork()
        rebuilt = _roll(self._ahead, old[0], self.asked, predictor.predict)
        points = slice(self.lo + 1, self.lo + len(old))
        new = torch.stack(rebuilt)
        change = self.stopping.change(points, new, old[1:], self._levels).amax(1)
        growth = (new.abs().amax() / old.abs().amax()).to(change.dtype)
        sizes = torch.cat([change, growth[None], self._oversize(points, new).to(change.dtype)[None]])
        *change_list, growth_value, size = (sizes if self._agree is None else self._agree(sizes)).tolist()
        return rebuilt, change_list, growth_value, size

    def _accepted(self, change: list[float]) -> int:
        """How many points of the window are final now; the point after a converged one has the answers it needs.

        Args:
            change: Of the points whose answers, and all before them, are the base model's.
        """
        tolerance = self.stopping.tolerance
        if len(change) == self.points - self.lo and all(size <= tolerance for size in change):
            return len(change)
        kept = (n for n, size in enumerate(change[:-1]) if not size <= _FREEZE * tolerance)  # not a number: kept
        return next(kept, len(change) - 1) + 1

    def _residuals(self, change: float, points: Sequence[int], guided: bool) -> None:
        """Keeps account of a sweep."""
        self.residuals.append(change)
        self.guided_rounds += guided
        if self._guide is not None:
            self._guide.asked(points)
            self._guide.saw(change, guided=guided)

    def _oversize(self, points: slice, samples: Tensor) -> Tensor:
        """The largest size of samples `[W, B, ...]` over that of data with a variance of 1, with its noise."""
        if self._guide is None or self._levels is None:
            return samples.new_zeros(())
        size = samples.to(working_dtype(samples.dtype)).flatten(2).square().mean(2).sqrt().amax(1)
        return (size / self._levels.size_of(1.0)[points].to(size)).amax()

    def _refuse_guide(self, outputs: Tensor) -> None:
        """Gives the PCM up, whose answers are no samples: the sweep ends before the first of them."""
        assert self._guide is not None
        self.guided_rounds += 1
        self._guide.drop()
        self._samples = self._samples[: len(outputs) + 1]
        self._sweep(outputs, (0.0,) * len(outputs))

    def _end_here(self) -> None:
        """Takes the trajectory's end as it is."""
        self.ended_early = True
        self.solver = self._ahead
        self._drop(self.points - self.lo)

    def _drop(self, accepted: int) -> None:
        """Moves the window's start past accepted points."""
        self.lo += accepted
        if self._kept is not None:
            self._kept += self._samples[:accepted]
        self._samples = self._samples[accepted:]

    def _extend_to(self, end: int) -> None:
        """Lays samples up to the point `end` without asking the model."""
        points = range(self.lo + len(self._samples) - 1, end)
        if self._guess is not None:
            self._samples += self._guess[points.start + 1 : points.stop + 1].unbind()
        else:
            self._samples += _roll(self._ahead, self._samples[-1], points, self._expect)

    def _expect(self, point: int, sample: Tensor) -> Tensor:
        """The answer to expect at a point that was never asked."""
        assert self._answered is not None
        anchor, anchor_sample, anchor_output = self._answered
        if self._levels is None:
            return anchor_output
        return self._levels.extrapolate(sample, point, anchor, anchor_sample, anchor_output)


def _leading_zeros(weights: Sequence[float]) -> int:
    return next((index for index, weight in enumerate(weights) if weight > 0), len(weights))


def _roll(solver: Solver, sample: Tensor, points: Iterable[int], answer: Answer) -> list[Tensor]:
    """The samples after each of `points`, one `solver.step` each."""
    samples = []
    for point in points:
        sample = solver.step(answer(point, sample), sample)
        samples.append(sample)
    return samples

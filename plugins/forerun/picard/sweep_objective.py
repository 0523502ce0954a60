"""The paper's own objective: the distance of the trajectory after a sweep to the finished one.

Its gradient runs through the rebuild, so all points of a sweep are in one update, and memory grows with their number;
`objective.py` has what is trained on by default. Here to compare both.

Source: arXiv 2503.19731, eq. 8 and 9.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from forerun.picard.objective import Rows
from forerun.picard.solver import Solver
from forerun.picard.trajectories import Trajectory

__all__ = ["SweepObjective"]

_LEAST = 1e-3  # root mean square of a spread
_SAME = 1e-3  # relative: a rebuild from finished answers against the finished trajectory


class SweepObjective:
    """Rebuilds finished trajectories from answers at unfinished ones.

    Args:
        solver: The sampler, at point 0.
        slope: `[T]` of the answer in the model's input, along which answers follow a move.
        finished: The sequential trajectories.
        sweeps: Of an update.

    Raises:
        ValueError: The sampler does not get from these answers to these samples by itself: guidance, random draws.
    """

    def __init__(self, solver: Solver, slope: Tensor, finished: list[Trajectory], sweeps: int) -> None:
        self._solver, self._slope, self._sweeps = solver, slope.tolist(), sweeps
        trajectory = finished[0]
        self._answers = trajectory.answers
        self._samples = self._rolled(trajectory)  # [T + 1, R, ...]
        again = torch.stack([solver.scale(x, point) for point, x in enumerate(self._samples[:-1])])
        if len(finished) > 1 or not (again - trajectory.inputs).norm() <= _SAME * trajectory.inputs.norm():
            raise ValueError(
                'objective "sweep" needs a sampler without guidance and random draws, whose model is called once a '
                'step for each sample; use objective "points"'
            )

    def pick(self, rows: Rows, generator: Generator) -> Tensor:
        """Whole sweeps, all at one age; point by point."""
        age = int(torch.randint(int(rows.ages.max()) + 1, (), generator=generator))
        by_point = _asked(rows, age)
        chosen = torch.randint(by_point.shape[1], (self._sweeps,), generator=generator)
        return by_point[:, chosen].flatten()

    def loss(self, answers: Tensor, rows: Rows) -> Tensor:
        """Mean squared distance of the sweep's samples, over the spread of those asked at (the paper's alpha)."""
        points = rows.points.unique().tolist()
        given, answers = (values.unflatten(0, (len(points), -1)) for values in (rows.samples, answers))
        owners = rows.owners[: given.shape[1], 1]
        wanted, known = (values[:, owners].to(answers.device) for values in (self._samples, self._answers))
        solver = self._solver.fork()
        for point in range(points[0]):
            solver.step(known[point], wanted[point])  # finished already: a multistep sampler keeps it as history
        sample, distances, spread = wanted[points[0]], [], []
        for index, point in enumerate(points):
            there, asked_at = solver.scale(sample, point), given[index].to(answers.device)
            spread.append((asked_at - solver.scale(wanted[point], point)).square().mean())
            sample = solver.step(answers[index] + self._slope[point] * (there - asked_at), sample)
            distances.append((sample - wanted[point + 1]).square().mean())
        return torch.stack(distances).mean() / (torch.stack(spread).mean().sqrt() + _LEAST)

    def table(self, answers: Tensor, rows: Rows) -> Tensor:
        every = [_asked(rows, age).flatten() for age in range(int(rows.ages.max()) + 1)]
        return torch.stack([self.loss(answers[index], rows[index]) for index in every])[:, None]

    @torch.no_grad()
    def _rolled(self, trajectory: Trajectory) -> Tensor:
        """`[T + 1, R, ...]` the sampler's samples, from the first one and the finished answers."""
        solver = self._solver.fork()
        first = trajectory.inputs[0]
        samples = [first / solver.scale(torch.ones_like(first), 0)]
        for answer in trajectory.answers:
            samples.append(solver.step(answer, samples[-1]))
        return torch.stack(samples)


def _asked(rows: Rows, age: int) -> Tensor:
    """`[points, R]` indices of the rows of the sweep that asks its points for the (age + 1)th time."""
    asked = (rows.ages == age).nonzero().flatten()
    return asked.reshape(rows.points[asked].unique().numel(), -1)

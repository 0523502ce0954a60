"""What a Picard Consistency Model is trained to answer.

In a sweep the model is asked at a sample `x` of an unfinished trajectory; the rebuild then carries its answer to the
sample's new place, with the slope that Gaussian data would give it (`forerun.picard.predict.Guided`). The sweep lands
on the finished trajectory if at every point

    answer(x) + slope * (x_finished - x) = answer(x_finished)

so the target at `x` is known from the finished trajectory alone. Points are independent of one another: memory does not
grow with their number, and no gradient runs through a sweep. Without the slope (0) errors at high noise are amplified
on their way to the end, up to a hundred times.

Source: arXiv 2503.19731, eq. 8, point by point; the slope: levels.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from forerun.picard.denoiser import Asked
from forerun.picard.trajectories import Trajectory

__all__ = ["Objective", "PointObjective", "Rows", "rows_of"]


@dataclass(frozen=True)
class Rows:
    """Samples of unfinished trajectories and what to answer there; `[N, ...]` each.

    Args:
        samples: What the model is given.
        targets: What it should answer.
        points: `[N]` the points of the trajectory.
        ages: `[N]` how many sweeps have asked the point before.
        owners: `[N, 2]` the trajectory in its list, and the row in it: whose conditioning it is.
    """

    samples: Tensor
    targets: Tensor
    points: Tensor
    ages: Tensor
    owners: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Tensor) -> Rows:
        return Rows(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @classmethod
    def joined(cls, parts: list[Rows]) -> Rows:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


def rows_of(trajectories: list[Trajectory], asked: list[Asked], slope: Tensor) -> Rows:
    """Every sample that sweeps have asked about, with its target.

    Args:
        trajectories: The finished ones, one per call that a step makes.
        asked: What the sweeps of one run from the same noise asked, in order.
        slope: `[T]` of the answer in the model's input, for Gaussian data.
    """
    ages = torch.zeros(len(trajectories), len(slope), dtype=torch.long)
    parts = []
    for part in asked:
        points = torch.tensor(part.points)
        finished = trajectories[part.call]
        given = part.inputs.detach().cpu().transpose(0, 1)  # [W, R, ...]
        targets = _targets(given, finished.inputs[points], finished.answers[points], slope[points])
        count, rows = given.shape[:2]
        owners = torch.tensor([part.call, 0]).repeat(count * rows, 1)
        owners[:, 1] = torch.arange(rows).repeat(count)
        parts.append(
            Rows(
                given.flatten(0, 1),
                targets.flatten(0, 1),
                points.repeat_interleave(rows),
                ages[part.call, points].repeat_interleave(rows),
                owners,
            )
        )
        ages[part.call, points] += 1
    return Rows.joined(parts)


class Objective(Protocol):
    """What an update brings down."""

    def pick(self, rows: Rows, generator: Generator) -> Tensor:
        """`[N]` indices of the rows of an update."""

    def loss(self, answers: Tensor, rows: Rows) -> Tensor:
        """`[]` for answers `[N, ...]` at the rows that were picked."""

    def table(self, answers: Tensor, rows: Rows) -> Tensor:
        """`[ages, T or 1]` the mean loss of answers at all rows, by the sweep (and the point), on the CPU."""


class PointObjective:
    """Rows by chance, each for itself: the mean squared distance of answers to their targets.

    Args:
        likely: `[ages, T]` how likely a row is chosen.
        batch: Rows of an update.
    """

    def __init__(self, likely: Tensor, batch: int) -> None:
        self._likely, self._batch = likely, batch

    def pick(self, rows: Rows, generator: Generator) -> Tensor:
        chances = self._likely[rows.ages.clamp(max=len(self._likely) - 1), rows.points]
        return torch.multinomial(chances, self._batch, replacement=True, generator=generator)

    def loss(self, answers: Tensor, rows: Rows) -> Tensor:
        return _errors(answers, rows.targets.to(answers.device)).mean()

    def table(self, answers: Tensor, rows: Rows) -> Tensor:
        sums, counts = torch.zeros(2, *self._likely.shape)
        sums.index_put_((rows.ages, rows.points), _errors(answers, rows.targets), accumulate=True)
        counts.index_put_((rows.ages, rows.points), torch.ones(len(rows)), accumulate=True)
        mean: Tensor = sums / counts.clamp(min=1)
        return mean


def _errors(answers: Tensor, targets: Tensor) -> Tensor:
    """`[N]` mean squared difference."""
    return (answers - targets).float().square().flatten(1).mean(1)


def _targets(given: Tensor, finished: Tensor, answers: Tensor, slope: Tensor) -> Tensor:
    """`[W, R, ...]`; conditioning beside the sample does not move, channels beyond it (a variance) do not follow."""
    move = slope.to(given).reshape(-1, *(1,) * (given.ndim - 1)) * (given - finished)
    if move.shape == answers.shape:
        return answers + move
    channels = min(move.shape[2], answers.shape[2])
    targets = answers.clone()
    targets[:, :, :channels] += move[:, :, :channels]
    return targets

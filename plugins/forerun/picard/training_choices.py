"""What a training of a Picard Consistency Model is given: its choices, and the base model in its sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from torch import Tensor, nn

from forerun.picard.consistency import Consistency
from forerun.picard.denoiser import Asked
from forerun.picard.levels import DATA_VARIANCE, NoiseLevels
from forerun.picard.solver import Solver
from forerun.picard.trajectories import Trajectory

__all__ = ["Objective", "Source", "Training"]

Objective = Literal["points", "sweep"]


@dataclass(frozen=True)
class Training:
    """Choices of a training.

    Args:
        steps: T of the sampler that the PCM is for.
        ages: Sweeps in which it may answer a point.
        full: Train all parameters of a copy in place of a LoRA: an answer between both models costs both calls.
        rank: Of the LoRA.
        turns: How many times new trajectories are made.
        samples: Trajectories of a turn, sampled together.
        updates: Of the LoRA, in a turn.
        batch: Rows (samples at a point) of an update.
        objective: "points": every answer for itself, in memory that does not grow with T; "sweep": the paper's, the
            trajectory after a sweep, with a gradient through all of it. As many whole sweeps as `batch` holds, at least
            one; for models that are called once a step for each sample (no guidance).
        learning_rate: Of Adam, after a warm-up and before it falls along a cosine.
        ema: Decay of the moving average.
        pool: Turns after which the same noise comes again; None: never. With a cache it bounds the disk.
        data_variance: See `forerun.picard.options.Options`; runs with the PCM take it from here.
        held_out: Samples to measure on.
        measure_every: Turns between two measurements, and between two checkpoints.
        mixed_precision: "no", "fp16" or "bf16".
        gradient_checkpointing: Less memory, more time.
        seed: Of the noise and of the choice of rows.

    Raises:
        ValueError: A number out of range.
    """

    steps: int = 50
    ages: int = 2
    full: bool = False
    rank: int = 32
    turns: int = 1000
    samples: int = 32
    updates: int = 8
    batch: int = 128
    objective: Objective = "points"
    learning_rate: float = 5e-4
    ema: float = 0.999
    pool: int | None = None
    data_variance: float = DATA_VARIANCE
    held_out: int = 16
    measure_every: int = 25
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("steps", "ages", "rank", "turns", "samples", "updates", "batch", "held_out", "measure_every")
        for name in whole:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give a whole number from 1")
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective is {self.objective!r}; give one of {', '.join(get_args(Objective))}")
        if self.pool is not None and (not isinstance(self.pool, int) or self.pool < 1):
            raise ValueError(f"pool is {self.pool!r}; give a whole number from 1, or None")
        for name in ("learning_rate", "data_variance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give a number above 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema!r}; give a number from 0 and below 1")


class Source(Protocol):
    """A base model in its sampler: what `train` runs. `forerun.picard.diffusers_training` has them."""

    module: nn.Module
    component: str  # the pipeline's name of the module
    name: str  # of the base model
    config: str  # the module's, as JSON; "" where it has none
    scheduler: str  # class
    scheduler_config: dict[str, Any]
    unbatched: frozenset[str]  # arguments of the module without a batch axis
    sample_name: str  # of the module's argument
    time_name: str

    def fingerprint(self) -> str:
        """Tells sources apart: the model, the scheduler's settings, the arguments."""

    def checkpoint_gradients(self, on: bool) -> None:
        """Makes the module compute activations again in a backward pass, or no longer."""

    def solver(self, steps: int) -> Solver:
        """The sampler, standing at point 0."""

    def levels(self, steps: int, data_variance: float) -> tuple[NoiseLevels, Tensor]:
        """Noise levels of the points, and `[T]` the slope of the answer in the model's input, for Gaussian data."""

    def finished(self, steps: int, seeds: Sequence[int]) -> list[Trajectory]:
        """Samples one after the other from the seeds' noise."""

    def asked(self, steps: int, seeds: Sequence[int], pcm: Consistency, sweeps: int) -> list[Asked]:
        """What the first sweeps of a parallel run with the PCM ask."""

    def rounds(self, steps: int, seeds: Sequence[int], pcm: Consistency | None, data_variance: float) -> int:
        """Rounds of a certified parallel run."""

"""What a user chooses about a parallel run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from forerun.picard.stopping import Norm, Stopping
from forerun.picard.window import Acceleration

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """Choices of a parallel run; the defaults are what measures best.

    Args:
        window: Most points in a sweep; None for all of them. Memory grows with it, rounds fall with it.
        tolerance: A point is accepted once a sweep changes it by no more; 0 runs until it is the sequential result.
        norm: What a change is measured against: "relative" to the point itself, or the scheduler's "noise" (ParaDiGMS).
        max_points_per_call: Most points in one model call; None for the whole window. Bounds memory, not rounds.
        acceleration: "secant", "anderson", or "none" for plain Picard iteration.
        coarse: Model calls, one after the other, that lay a first trajectory; 1 for none but the one every run makes.
        warm_start: Start from the last run's trajectory where it fits (the same steps and shape).
        check_cost: Measure once how the model's batch scales, and warn when parallel sampling is slower here.
        auto: Step aside, instead of warning, when parallel sampling is slower here.
        data_variance: Of a clean sample's elements, given the conditioning; the slope along which answers follow a move
            comes from it. None: that of the run's Picard Consistency Model, which it was trained with, and 0.25
            without one, as images and latents scaled for diffusion have it. A policy's actions hardly vary given what
            it sees: 0.01, say, where they range from -1 to 1. It changes rounds, not the result.
        exact: False: end after `sweeps` rounds with whatever the trajectory is then, a Picard Consistency Model's
            answers among it. The result is approximate.
        sweeps: How many rounds with `exact=False`.

    Raises:
        ValueError: A choice that is out of range.
    """

    window: int | None = None
    tolerance: float = 1e-3
    norm: Norm = "relative"
    max_points_per_call: int | None = None
    acceleration: Acceleration = "secant"
    coarse: int = 1
    warm_start: bool = False
    check_cost: bool = True
    auto: bool = False
    data_variance: float | None = None
    exact: bool = True
    sweeps: int | None = None

    def __post_init__(self) -> None:
        self.stopping()
        for name in ("window", "max_points_per_call"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; give a whole number from 1, or None for no limit")
        if self.acceleration not in ("secant", "anderson", "none"):
            raise ValueError(f"acceleration is {self.acceleration!r}; give 'secant', 'anderson' or 'none'")
        if not isinstance(self.coarse, int) or self.coarse < 1:
            raise ValueError(f"coarse is {self.coarse!r}; give the number of calls, 1 for no coarse start")

        if self.data_variance is not None and not self.data_variance > 0:
            raise ValueError(f"data_variance is {self.data_variance!r}; give a number above 0, or None")
        if self.exact != (self.sweeps is None):
            raise ValueError(
                f"exact is {self.exact} and sweeps is {self.sweeps}: a number of sweeps ends the run before it is the "
                "sequential result; give exact=False and sweeps together, or neither"
            )
        if self.sweeps is not None and (self.sweeps < 1 or self.window is not None or self.auto):
            raise ValueError("sweeps needs a number from 1, no window (each sweep takes all points), and no auto")

    def stopping(self) -> Stopping:
        return Stopping(self.tolerance, self.norm)

    def as_config(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def names(cls) -> frozenset[str]:
        return frozenset(field.name for field in fields(cls))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Reads `as_config`; choices of a later release are left out."""
        return cls(**{name: value for name, value in config.items() if name in cls.names()})

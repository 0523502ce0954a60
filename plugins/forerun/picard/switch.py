"""Model switching: which points of a sweep a Picard Consistency Model answers, and with what weight.

A Picard Consistency Model (PCM) predicts the finished trajectory's answer from an unfinished sample. It is worth most
where a point has just entered the window and little where the trajectory has settled, and the result has to be the base
model's: so its weight falls to 0 with a point's *age*, the number of sweeps that have asked it.

Source: Picard Consistency Model for Fast Parallel Sampling of Diffusion Models, arXiv 2503.19731, section 3.3; ages in
place of its global sweep counter, so that points that enter a sliding window late see the PCM too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from forerun.picard.levels import NoiseLevels

__all__ = ["Guide", "Switch"]

# A sweep after the PCM's that changes more than this share of what the PCM's changed: the PCM did not help.
_HELPED = 0.8


@dataclass(frozen=True)
class Switch:
    """How the PCM's weight depends on a point's age and noise.

    Args:
        from_signal: For each age at which the PCM answers, the least signal-to-noise ratio (alpha over sigma) of the
            points that it answers; 0 for all of them. As many ages as there are numbers, the base model after that.
        fade: The weight falls in equal steps from 1 at age 0 to 0 after the last age; False: it stays 1 until then.
        watch: Give the PCM up for the rest of a run after a sweep that it did not help.

    Raises:
        ValueError: No age at all, or a negative ratio.

    Source: arXiv 2503.19731, eq. 12 (`fade`).
    """

    from_signal: tuple[float, ...] = (0.0,)
    fade: bool = False
    watch: bool = True

    def __post_init__(self) -> None:
        if not self.from_signal or any(not ratio >= 0 for ratio in self.from_signal):
            raise ValueError(f"from_signal is {self.from_signal!r}; give one number >= 0 or more, one per age")

    def weight(self, age: int, signal: float) -> float:
        """Of the PCM's answer against the base model's, 0 to 1."""
        ages = len(self.from_signal)
        if age >= ages or signal < self.from_signal[age]:
            return 0.0
        return 1 - age / ages if self.fade else 1.0

    def as_config(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Reads `as_config`."""
        return cls(**{**config, "from_signal": tuple(config["from_signal"])})


class Guide:
    """A switch at work in one run.

    Args:
        switch: The rule.
        levels: Noise levels of the points.
    """

    def __init__(self, switch: Switch, levels: NoiseLevels) -> None:
        self._switch = switch
        self._signal = (levels.alpha / levels.sigma).tolist()
        self._ages = [0] * len(self._signal)
        self._last: float | None = None  # largest change of the last sweep, if the PCM answered in it
        self.dropped = False

    def weights(self, points: Sequence[int]) -> tuple[float, ...]:
        """Of the PCM at the points asked together; the first is the base model's, so that every sweep accepts one."""
        if self.dropped:
            return (0.0,) * len(points)
        return (0.0, *(self._weight(point) for point in points[1:]))

    def asked(self, points: Iterable[int]) -> None:
        """Says that the points have been asked once more."""
        for point in points:
            self._ages[point] += 1

    def saw(self, change: float, *, guided: bool) -> None:
        """Says how much a sweep changed at most, and whether the PCM answered in it."""
        if self._last is not None and not change <= _HELPED * self._last and self._switch.watch:
            self.dropped = True
        self._last = change if guided else None

    def drop(self) -> None:
        """Gives the PCM up for the rest of the run."""
        self.dropped = True

    def _weight(self, point: int) -> float:
        return self._switch.weight(self._ages[point], self._signal[point])

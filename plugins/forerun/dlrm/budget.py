"""How long a search may go on: a count of work, and a clock only where one is asked for."""

from __future__ import annotations

import time

__all__ = ["Budget"]


class Budget:
    """Work that may still be done.

    Args:
        work: Units, about a microsecond of one core each, counted from sizes: the same input, the same end.
        deadline: Moment of `time.monotonic()` (s) after which no more is done either; None: the clock is not read.
    """

    def __init__(self, work: float, deadline: float | None = None) -> None:
        self.work = work
        self.spent = 0.0
        self.deadline = deadline

    @property
    def out(self) -> bool:
        """Whether to stop."""
        return self.spent >= self.work or (self.deadline is not None and time.monotonic() >= self.deadline)

    def spend(self, units: float) -> None:
        """Counts work as done."""
        self.spent += units

"""How a planner's time limit is shared out: listing the options, searching, and what torchrec does after that."""

from __future__ import annotations

import time

__all__ = ["Clock"]

_LISTING = 0.5  # share of the limit after which options that have no estimate yet are left out
_AFTERWARDS = 0.1  # share that is kept for what comes after the search: copies, statistics, validation,
_AFTERWARDS_OF_LISTING = 0.4  # or share of the time that listing took, if that is longer


class Clock:
    """Starts when it is made.

    Args:
        limit: The user's time limit (s); None: there is none.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self.began = time.monotonic()
        self.listing = 0.0  # s that listing took, once it is over

    def listed(self) -> None:
        """Listing is over."""
        self.listing = self.seconds

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    @property
    def enough_listed(self) -> bool:
        """Whether to go on with the options that have estimates."""
        return self.limit is not None and self.seconds > _LISTING * self.limit

    @property
    def out(self) -> bool:
        """Whether the limit is over."""
        return self.limit is not None and self.seconds > self.limit

    @property
    def deadline(self) -> float | None:
        """When all search has to be over, on `time.monotonic()`'s clock; None: no limit."""
        if self.limit is None:
            return None
        return self.began + self.limit - max(_AFTERWARDS * self.limit, _AFTERWARDS_OF_LISTING * self.listing)

    @property
    def searches(self) -> bool:
        """Whether there is time for more search."""
        return self.deadline is None or time.monotonic() < self.deadline

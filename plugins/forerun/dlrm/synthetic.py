"""Ids to look up, for load without a log: uniform, by a power law, or with the stack distances of a trace.

The stack distance of an access is the number of distinct ids since the last access to the same id, this one counted:
1 for the id that was accessed last. A cache of C rows with the least recently used replaced hits where it is at most C,
so ids with the distances of a trace have the trace's locality, which a distribution over ids alone has not.

Source: Deep Learning Recommendation Model, arXiv 1906.00091, section 4 (synthetic data: algorithms 1 and 2, the
profile of a trace and its synthesis).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ids", "PowerLaw", "StackDistance", "StackDistances", "Uniform"]


class Ids(Protocol):
    """Draws ids of a table's rows."""

    def draw(self, size: int, random: np.random.Generator) -> NDArray[np.int64]:
        """The next `size` ids, each in 0 to the table's rows - 1."""
        ...


class Uniform:
    """Every row is as likely as any other.

    Args:
        rows: Of the table.

    Raises:
        ValueError: No rows.
    """

    def __init__(self, rows: int) -> None:
        self._rows = _checked(rows)

    def draw(self, size: int, random: np.random.Generator) -> NDArray[np.int64]:
        return random.integers(0, self._rows, size)


class PowerLaw:
    """Row k is looked up in proportion to (k + 1) ** -exponent: row 0 most, as categories numbered by frequency.

    Takes no memory for the rows, however many they are.

    Args:
        rows: Of the table.
        exponent: Above 0; about 1 for many click logs.

    Raises:
        ValueError: No rows, or an exponent that is not above 0 and finite.

    Source: Hörmann and Derflinger, Rejection-inversion to generate variates from monotone discrete distributions, 1996.
    """

    def __init__(self, rows: int, exponent: float) -> None:
        if not (exponent > 0 and np.isfinite(exponent)):
            raise ValueError(f"exponent is {exponent}; give a finite number above 0")
        self._rows, self._exponent = _checked(rows), exponent
        # Row k has the area of its bar, 1 wide; the first bar's is 1, which the curve's would exceed.
        self._first = float(self._integral(np.float64(1.5))) - 1.0
        self._last = float(self._integral(np.float64(rows + 0.5)))

    def draw(self, size: int, random: np.random.Generator) -> NDArray[np.int64]:
        found = np.empty(size, dtype=np.int64)
        left = np.arange(size)
        while len(left):
            area = self._last + random.random(len(left)) * (self._first - self._last)
            rank = np.clip(np.rint(self._inverse(area)), 1, self._rows)
            taken = area >= self._integral(rank + 0.5) - rank**-self._exponent
            found[left[taken]] = rank[taken].astype(np.int64) - 1
            left = left[~taken]
        return found

    def _integral(self, x: Any) -> Any:
        """Of t ** -exponent from 1 to x."""
        log, power = np.log(x), 1 - self._exponent
        return log if power == 0 else np.expm1(power * log) / power

    def _inverse(self, area: Any) -> Any:
        power = 1 - self._exponent
        # Rounding may put an area a trifle past the pole of the inverse.
        return np.exp(area) if power == 0 else np.exp(np.log1p(np.maximum(power * area, np.nextafter(-1, 0))) / power)


@dataclass(frozen=True, eq=False)
class StackDistances:
    """How often each stack distance occurs; 0 stands for an id that was never accessed before."""

    distances: NDArray[np.int64]  # ascending, each once
    counts: NDArray[np.int64]  # of each, above 0

    @classmethod
    def of(cls, trace: Iterable[int]) -> Self:
        """Profiles a trace of ids.

        Equal to, for an access to `id` on the stack of all ids seen, most recent first::

            distance = stack.index(id) + 1 if id in stack else 0

        Raises:
            ValueError: The trace is empty.
        """
        last: dict[int, int] = {}  # id -> when it was accessed last
        times: list[int] = []  # the same times, ascending
        found: dict[int, int] = {}
        for now, each in enumerate(trace):
            distance = 0
            if each in last:
                place = bisect_left(times, last[each])
                distance = len(times) - place
                del times[place]
            times.append(now)
            last[each] = now
            found[distance] = found.get(distance, 0) + 1
        if not found:
            raise ValueError("the trace is empty: give at least one id")
        distances = np.array(sorted(found), dtype=np.int64)
        return cls(distances, np.array([found[int(each)] for each in distances], dtype=np.int64))

    @property
    def shares(self) -> NDArray[np.float64]:
        """The probability of each distance."""
        shares: NDArray[np.float64] = self.counts / self.counts.sum()
        return shares


class StackDistance:
    """Ids whose stack distances are distributed as a trace's.

    Goes on where the last draw ended. Distances that the ids drawn so far do not reach yet are not drawn, nor is an
    id that is new once every row was accessed: the distribution is cut and scaled there, as in the paper.

    Args:
        profile: The distances to draw.
        rows: Of the table; ids are numbered in the order of their first access.

    Raises:
        ValueError: No rows, or a profile without a 0, of which no id can come.
    """

    def __init__(self, profile: StackDistances, rows: int) -> None:
        if profile.distances[0] != 0:
            raise ValueError("the profile has no distance 0: no id is ever accessed first; profile a whole trace")
        self._rows = _checked(rows)
        self._distances = profile.distances.tolist()
        self._upto = np.cumsum(profile.counts) / profile.counts.sum()
        self._stack: list[int] = []  # ids, most recent last

    def draw(self, size: int, random: np.random.Generator) -> NDArray[np.int64]:
        stack, distances = self._stack, self._distances
        new = float(self._upto[0])
        found = np.empty(size, dtype=np.int64)
        for place, share in enumerate(random.random(size)):
            deepest = bisect_left(distances, len(stack) + 1) - 1  # the last distance that the stack reaches
            least = new if len(stack) == self._rows and deepest > 0 else 0.0
            most = float(self._upto[deepest])
            distance = distances[min(int(self._upto.searchsorted(least + share * (most - least), "right")), deepest)]
            if distance == 0 and len(stack) == self._rows:
                distance = self._rows  # every row was seen, and only "new" is in reach: the one not seen for longest
            each = stack.pop(-distance) if distance else len(stack)
            stack.append(each)
            found[place] = each
        return found


def _checked(rows: int) -> int:
    if rows < 1:
        raise ValueError(f"a table of {rows} rows has no ids; give at least 1")
    return rows

"""How little all ranks must take in common, if hosts hold patterns and no rank more than a share beside it."""

from __future__ import annotations

from typing import NamedTuple

import highspy
import numpy as np
from numpy.typing import NDArray

from forerun.dlrm import highs
from forerun.dlrm.patterns import Block, Parts, Pattern, richest

__all__ = ["Master"]


class _Answer(NamedTuple):
    value: float  # of the programme with the patterns so far
    price: NDArray[np.float64]  # [Q] of parts
    rent: float  # of a block: a pattern helps if its parts are worth more


class Master:
    """A linear programme over options and patterns, which grows by the patterns that its prices find worth most.

    Minimise the sum of `common[o] * x[o]` with ::

        x of each table's options sum to 1; the blocks' patterns y sum to at most their number;
        per part: sum of pattern[p].holds * y[p] >= number * x[its option]

    Any prices of parts `price >= 0` bound the programme of *all* patterns (Lagrangian relaxation of the parts' rows)::

        sum over tables of min(common[o] + (number * price of o's parts).sum()) - blocks * worth of the richest pattern

    Source: Gilmore & Gomory, A Linear Programming Approach to the Cutting-Stock Problem, 1961; Farley, A Note on
    Bounding a Class of Linear Programming Problems, 1990; smoothed prices: Wentges, Weighted Dantzig-Wolfe
    Decomposition, 1997.

    Args:
        parts: What the options are made of.
        block: What the patterns are of.
        option_table: `[O]` the table of each option.
        used: `[O]` which options there are.
        common: `[O]` ms that an option puts on every rank (0 for those made of parts).
        never: ms that count as impossible: what leaving a table out costs.
    """

    def __init__(
        self,
        parts: Parts,
        block: Block,
        option_table: NDArray[np.int64],
        used: NDArray[np.bool_],
        common: NDArray[np.float64],
        never: float,
    ) -> None:
        self._parts, self._block, self._never = parts, block, never
        self._options = np.flatnonzero(used)
        _, self._table = np.unique(option_table[self._options], return_inverse=True)
        self._tables = int(self._table.max()) + 1
        self._common = common[self._options]
        self._of = np.searchsorted(self._options, parts.option)  # [Q] position of the part's option
        self._part_table = self._table[self._of]
        self._patterns: list[Pattern] = []
        self.work = 0  # simplex iterations so far

    def least(self, share: float, enough: float, work: int, close: float) -> float:
        """A number (ms) that the programme's value, over all patterns that fit a share, is not below.

        Args:
            share: ms of each rank that a pattern may take.
            enough: It may end as soon as the value is known to be at least so much.
            work: Simplex iterations, counted from the first call, after which it ends.
            close: It ends when no more than this (ms) is open.
        """
        self._patterns = [pattern for pattern in self._patterns if pattern.rating <= share]
        solver = self._programme()
        for pattern in self._patterns:
            self._add(solver, pattern)
        proved = 0.0
        centre: NDArray[np.float64] | None = None  # the prices that proved it
        while self.work < work and proved < enough:
            answer = self._solve(solver)
            if answer.value - proved <= close:
                break
            # Prices jump from one answer to the next: halfway to those that proved most they are asked first.
            smooth = [] if centre is None else [(centre + answer.price) / 2]
            for price in (*smooth, answer.price):
                pattern, worth, iterations = richest(self._parts, self._part_table, self._block, share, price)
                self.work += iterations
                value = self._bound(price, worth)
                if value > proved:
                    proved, centre = value, price
                if pattern.holds @ answer.price > answer.rent + 1e-9 * self._never:
                    self._patterns.append(pattern)
                    self._add(solver, pattern)
                    break
            else:  # none helps: the programme is solved
                break
        return proved

    def _bound(self, price: NDArray[np.float64], worth: float) -> float:
        weight = self._common + np.bincount(self._of, self._parts.number * price, len(self._options))
        cheapest = np.full(self._tables, self._never)
        np.minimum.at(cheapest, self._table, weight)
        return float(cheapest.sum()) - self._block.count * worth

    def _programme(self) -> highspy.Highs:
        """Rows: tables, parts, blocks. Columns: options, and per table what leaves it out."""
        rows = self._tables + len(self._parts.number) + 1
        solver = highs.solver()
        low = np.concatenate([np.ones(self._tables), np.zeros(len(self._parts.number)), [-np.inf]])
        high = np.concatenate([np.ones(self._tables), np.full(rows - self._tables - 1, np.inf), [self._block.count]])
        for lower, upper in zip(low.tolist(), high.tolist(), strict=True):
            solver.addRow(lower, upper, 0, [], [])
        for position, cost in enumerate(self._common.tolist()):
            own = np.flatnonzero(self._of == position)
            index = np.concatenate([[self._table[position]], self._tables + own])
            values = np.concatenate([[1.0], -self._parts.number[own].astype(float)])
            solver.addCol(cost, 0.0, np.inf, len(index), index.astype(np.int32), values)
        for table in range(self._tables):
            solver.addCol(self._never, 0.0, np.inf, 1, np.array([table], np.int32), np.ones(1))
        return solver

    def _add(self, solver: highspy.Highs, pattern: Pattern) -> None:
        held = np.flatnonzero(pattern.holds)
        index = np.concatenate([self._tables + held, [self._tables + len(self._parts.number)]])
        values = np.concatenate([pattern.holds[held].astype(float), [1.0]])
        solver.addCol(0.0, 0.0, np.inf, len(index), index.astype(np.int32), values)

    def _solve(self, solver: highspy.Highs) -> _Answer:
        solver.run()
        info = solver.getInfo()
        self.work += max(int(info.simplex_iteration_count), 1)
        dual = np.array(solver.getSolution().row_dual)
        price = np.maximum(dual[self._tables : -1], 0.0)
        return _Answer(float(info.objective_function_value), price, max(-float(dual[-1]), 0.0))

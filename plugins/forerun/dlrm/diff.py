"""What changes from one plan to another, and how many bytes must move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forerun.dlrm.problem import Plan, Problem

__all__ = ["Difference", "difference"]


@dataclass(frozen=True, eq=False)
class Difference:
    """From one plan to another.

    Args:
        tables: `[...]` tables whose option or ranks change.
        arriving: `[R, M]` bytes that each rank takes and did not hold.
    """

    tables: NDArray[np.int64]
    arriving: NDArray[np.int64]

    @property
    def moved(self) -> NDArray[np.int64]:
        """`[M]` bytes that move in all."""
        return np.asarray(self.arriving.sum(0), np.int64)


def difference(problem: Problem, before: Plan, after: Plan) -> Difference:
    """What changes.

    A shard of the same option that stays on its rank does not move; equal shards that change places both do. A table
    that changes its option counts with all bytes of its new shards: the problem does not say which rows they share.
    """
    arriving = np.zeros_like(problem.capacity)
    changed = []
    for table in range(problem.tables):
        option = int(after.option[table])
        ranks, memory = after.ranks[table], problem.memory[problem.of(option)]
        moves = np.ones(len(ranks), bool)
        if before.option[table] == option:
            moves = before.ranks[table] != ranks
        if moves.any():
            changed.append(table)
            np.add.at(arriving, ranks[moves], memory[moves])
    return Difference(np.array(changed, np.int64), arriving)

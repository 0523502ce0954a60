"""Co-located tables as one table, so that nothing after this knows of groups."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from forerun.dlrm.problem import Plan, Problem, make_plan

__all__ = ["Merged", "merge"]

_KEPT = 64  # combinations of one spread and shard count that a group of tables keeps


@dataclass(frozen=True, eq=False)
class Merged:
    """A problem without groups, and the way back.

    Args:
        original: The problem with groups.
        problem: One table per group, its options what the tables take together.
        members: Per merged table, its tables.
        choices: Per merged option, the options of those tables.
        complete: Whether the merged options hold all that may be best (else the cheapest and the smallest of them).
    """

    original: Problem
    problem: Problem
    members: tuple[tuple[int, ...], ...]
    choices: tuple[tuple[int, ...], ...]
    complete: bool

    @property
    def loose(self) -> Problem:
        """The original problem as if no tables were together: what bounds it from below bounds the original."""
        return replace(self.original, group=np.full(self.original.tables, -1))

    def expand(self, plan: Plan) -> Plan:
        """A plan of the merged problem as one of the original."""
        if self.problem is self.original:
            return plan
        option = np.zeros(self.original.tables, np.int64)
        ranks: list[NDArray[np.int64]] = [option] * self.original.tables
        for members, chosen, placed in zip(self.members, plan.option.tolist(), plan.ranks, strict=True):
            for table, own in zip(members, self.choices[chosen], strict=True):
                option[table], ranks[table] = own, placed
        return make_plan(self.original, option, ranks)

    def contract(self, plan: Plan) -> Plan | None:
        """A plan of the original as one of the merged problem; None if that does not hold its options."""
        if self.problem is self.original:
            return plan
        number = {(self.problem.table[o], choice): o for o, choice in enumerate(self.choices)}
        keys = [(t, tuple(plan.option[list(members)].tolist())) for t, members in enumerate(self.members)]
        if any(key not in number for key in keys):
            return None
        ranks = [plan.ranks[members[0]] for members in self.members]
        return make_plan(self.problem, [number[key] for key in keys], ranks)


def merge(problem: Problem) -> Merged:
    """The problem with one table per group.

    Raises:
        ValueError: The tables of a group have no spread and number of shards in common, or different host groups.
    """
    groups, inverse = np.unique(problem.group, return_inverse=True)
    if (np.bincount(inverse)[groups >= 0] < 2).all():
        alone = tuple((f,) for f in range(problem.tables))
        single = tuple((o,) for o in range(len(problem.spread)))
        if (groups >= 0).any():
            problem = replace(problem, group=np.full(problem.tables, -1))
        return Merged(problem, problem, alone, single, True)
    members: list[tuple[int, ...]] = []
    seen: set[int] = set()
    for table, group in enumerate(problem.group.tolist()):
        if group < 0:
            members.append((table,))
        elif group not in seen:
            seen.add(group)
            members.append(tuple(np.flatnonzero(problem.group == group).tolist()))
    complete = True
    choices_of: list[list[tuple[int, ...]]] = []
    for tables in members:
        if len({int(problem.host_group[f]) for f in tables}) > 1:
            raise ValueError(f"tables {tables} are one group, but of different host groups")
        choices, whole = _together(problem, tables)
        if not choices:
            raise ValueError(f"tables {tables} are one group, but have no spread and number of shards in common")
        choices_of.append(choices)
        complete = complete and whole
    chosen = [choice for choices in choices_of for choice in choices]
    merged = Problem(
        np.cumsum([0] + [len(choices) for choices in choices_of]),
        np.cumsum([0] + [int(problem.shards[choice[0]]) for choice in chosen]),
        problem.spread[[choice[0] for choice in chosen]],
        np.concatenate([sum(problem.cost[problem.of(o)] for o in choice) for choice in chosen]),
        np.concatenate([sum(problem.memory[problem.of(o)] for o in choice) for choice in chosen]),
        problem.capacity,
        problem.host,
        problem.base,
        host_group=problem.host_group[[tables[0] for tables in members]],
    )
    return Merged(problem, merged, tuple(members), tuple(chosen), complete)


def _together(problem: Problem, tables: tuple[int, ...]) -> tuple[list[tuple[int, ...]], bool]:
    """The options that the tables may take together, without those that another one beats everywhere."""
    found: list[tuple[int, ...]] = []
    complete = True
    first = range(int(problem.option_start[tables[0]]), int(problem.option_start[tables[0] + 1]))
    if len(tables) == 1:
        return [(o,) for o in first], True
    for spread, shards in sorted({(int(problem.spread[o]), int(problem.shards[o])) for o in first}):
        choices: list[tuple[int, ...]] = [()]
        sizes = np.zeros((1, shards, 1 + problem.capacity.shape[1]))  # cost and memory of each shard
        for table in tables:
            own = np.arange(problem.option_start[table], problem.option_start[table + 1])
            own = own[(problem.spread[own] == spread) & (problem.shards[own] == shards)]
            if not len(own):
                choices = []
                break
            index = problem.shard_start[own, None] + np.arange(shards)
            mine = np.concatenate([problem.cost[index][..., None], problem.memory[index]], axis=-1)
            sizes = (sizes[:, None] + mine[None]).reshape(-1, *sizes.shape[1:])
            choices = [(*choice, int(o)) for choice in choices for o in own]
            kept, whole = _undominated(sizes.reshape(len(sizes), -1), shards)
            complete = complete and whole
            choices, sizes = [choices[k] for k in kept], sizes[kept]
        found += choices
    return found, complete


def _undominated(sizes: NDArray[np.float64], shards: int) -> tuple[list[int], bool]:
    """The rows that no other row undercuts, and whether that is all of them."""
    totals = sizes.reshape(len(sizes), shards, -1).sum(1)
    kept: list[int] = []
    for row in np.lexsort((totals.sum(1), totals[:, 0])).tolist():
        if not kept or not (sizes[kept] <= sizes[row]).all(1).any():
            kept.append(row)
    if len(kept) <= _KEPT:
        return sorted(kept), True
    smallest = [kept[int(np.argmin(totals[kept, tier]))] for tier in range(1, totals.shape[1])]
    return sorted({*kept[: _KEPT - len(smallest)], *smallest}), False

"""All plans below a rating as an integer programme.

Columns: the rating; per option whether it is taken; per kind of equal shards and rank how many go there (per host for
what lies on whole hosts). Ranks, or hosts, that may change names without changing anything are told apart by the tables
that come first: the i-th table uses no more names than it and those before it can have asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from forerun.dlrm.options import Options
from forerun.dlrm.problem import Problem, Spread

__all__ = ["Programme", "build"]


@dataclass
class Programme:
    """Minimise column 0 with `low <= A @ x <= high`, `0 <= x <= upper`, all columns but 0 integer.

    `fill` lists, per option, what its columns put where: (column, shards of one kind in order, ranks for one unit).
    """

    upper: list[float] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    column: list[int] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    taken: dict[int, int] = field(default_factory=dict)  # option -> column
    fill: dict[int, list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]] = field(default_factory=dict)

    def add_column(self, upper: float) -> int:
        """A new column; its number."""
        self.upper.append(upper)
        return len(self.upper) - 1

    def add_row(self, terms: list[tuple[int, float]], low: float, high: float) -> None:
        """A new row."""
        for column, value in terms:
            self.row.append(len(self.low))
            self.column.append(column)
            self.value.append(value)
        self.low.append(low)
        self.high.append(high)

    def choices(self, values: NDArray[np.float64], problem: Problem) -> tuple[list[int], list[NDArray[np.int64]]]:
        """Options and ranks of a solution's columns."""
        chosen, ranks = [], []
        for table in range(problem.tables):
            own = [o for o in range(*problem.option_start[[table, table + 1]].tolist()) if o in self.taken]
            option = max(own, key=lambda o: values[self.taken[o]])
            placed = np.zeros(problem.shards[option], np.int64)
            next_of: dict[int, int] = {}
            for column, shards, where in self.fill[option]:
                for _ in range(round(values[column])):
                    begin = next_of.get(int(shards[0]), 0)
                    placed[shards[begin : begin + len(where)]] = where
                    next_of[int(shards[0])] = begin + len(where)
            chosen.append(option)
            ranks.append(placed)
        return chosen, ranks


def build(problem: Problem, options: Options, rating: float) -> Programme:
    """The programme of all plans of a problem (without groups) that rate at most `rating` (ms), ranks unnamed."""
    programme = Programme()
    programme.add_column(rating)
    cost_rows: list[list[tuple[int, float]]] = [[(0, -1.0)] for _ in range(problem.ranks)]
    unit = np.maximum(problem.capacity.max(0) / 1e3, 1.0)  # bytes: coefficients near those of costs
    memory_rows = [[[] for _ in unit] for _ in range(problem.ranks)]  # type: list[list[list[tuple[int, float]]]]
    host_of_group: dict[int, list[int]] = {}
    for group in np.unique(problem.host_group[problem.host_group >= 0]).tolist():
        host_of_group[group] = [programme.add_column(1) for _ in problem.hosts]
        programme.add_row([(column, 1.0) for column in host_of_group[group]], 1, 1)
    first_hosts = _names(problem, options, rating)
    for table in range(problem.tables):
        taken: list[tuple[int, float]] = []
        for option in range(*problem.option_start[[table, table + 1]].tolist()):
            if options.peak[option] > rating:
                continue
            programme.taken[option] = programme.add_column(1)
            taken.append((programme.taken[option], 1.0))
            hosts = host_of_group.get(int(problem.host_group[table]), [])
            programme.fill[option] = _fill(programme, problem, option, rating, first_hosts[table], hosts)
            for column, shards, where in programme.fill[option]:
                for shard, rank in zip(shards[: len(where)], where.tolist(), strict=True):
                    index = problem.shard_start[option] + shard
                    cost_rows[rank].append((column, float(problem.cost[index])))
                    for tier in np.flatnonzero(problem.memory[index]).tolist():
                        memory_rows[rank][tier].append((column, float(problem.memory[index, tier] / unit[tier])))
        programme.add_row(taken, 1, 1)
    for rank, row in enumerate(cost_rows):
        programme.add_row(row, -np.inf, -float(problem.base[rank]))
        for tier, terms in enumerate(memory_rows[rank]):
            if terms:
                programme.add_row(terms, -np.inf, float(problem.capacity[rank, tier] / unit[tier]))
    return programme


def _fill(
    programme: Programme, problem: Problem, option: int, rating: float, names: int, group: list[int]
) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """The columns that place an option, with the rows that tie them to its being taken."""
    spread, count = problem.spread[option], int(problem.shards[option])
    taken = programme.taken[option]
    everywhere = np.arange(problem.ranks)
    if spread == Spread.ALL:
        return [(taken, np.arange(count), everywhere)]
    whole_hosts = spread in (Spread.HOST, Spread.HOSTS)
    places: list[NDArray[np.int64]] = [everywhere[r : r + 1] for r in range(min(names, problem.ranks))]
    if whole_hosts:
        places = [ranks for ranks in problem.hosts if ranks[0] < names]
        if spread == Spread.HOST:
            places = [ranks for ranks in places if len(ranks) == count]
    size = len(places[0]) if places else 1
    index = problem.shard_start[option] + np.arange(count).reshape(-1, size)
    traits = np.concatenate([problem.cost[index][..., None], problem.memory[index]], -1).reshape(len(index), -1)
    _, kind = np.unique(traits, axis=0, return_inverse=True)
    inside: dict[int, int] = {}
    if spread == Spread.WITHIN and count > 1 and not group:
        inside = {h: programme.add_column(1) for h in range(len(problem.hosts))}
        programme.add_row([(taken, -1.0), *((column, 1.0) for column in inside.values())], 0, 0)
    elif group:
        inside = dict(enumerate(group))
    filled: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = []
    at_place: list[list[tuple[int, float]]] = [[] for _ in places]
    for number in range(int(kind.max()) + 1):
        parts = np.flatnonzero(kind.ravel() == number)
        shards = (parts[:, None] * size + np.arange(size)).ravel()
        mine = problem.shard_start[option] + shards[:size]
        row: list[tuple[int, float]] = [(taken, -float(len(parts)))]
        for place, ranks in enumerate(places):
            if (problem.memory[mine] > problem.capacity[ranks]).any():
                continue
            if (problem.cost[mine] + problem.base[ranks]).max() > rating:
                continue
            most = 1 if spread == Spread.APART else len(parts)
            column = programme.add_column(most)
            row.append((column, 1.0))
            at_place[place].append((column, 1.0))
            filled.append((column, shards, ranks))
            if inside:
                host = inside[int(problem.host_index[ranks[0]])]
                programme.add_row([(column, 1.0), (host, -float(most))], -np.inf, 0)
        programme.add_row(row, 0, 0)
    if count > size and spread in (Spread.APART, Spread.HOSTS):
        rounds, more = divmod(len(index), len(problem.hosts)) if spread == Spread.HOSTS else (0, 1)
        for terms in at_place:
            if terms and spread == Spread.APART:
                programme.add_row([*terms, (taken, -1.0)], -np.inf, 0)
            elif terms:
                programme.add_row([*terms, (taken, -float(rounds + (more > 0)))], -np.inf, 0)
                programme.add_row([*terms, (taken, -float(rounds))], 0, np.inf)
    return filled


def _names(problem: Problem, options: Options, rating: float) -> NDArray[np.int64]:
    """`[F]` how many of the first ranks a table needs to be offered."""
    every = np.full(problem.tables, problem.ranks)
    used = options.peak <= rating
    alike = (problem.capacity == problem.capacity[0]).all() and (problem.base == problem.base[0]).all()
    hosted = np.isin(problem.spread[used], (Spread.HOST, Spread.HOSTS, Spread.WITHIN)).any()
    size = len(problem.hosts[0]) if hosted or (problem.host_group >= 0).any() else 1
    if not alike or (size > 1 and len({len(ranks) for ranks in problem.hosts}) > 1):
        return every
    for option in np.flatnonzero(used & (problem.spread == Spread.ALL)).tolist():
        cost = problem.cost[problem.of(option)].reshape(-1, size)
        memory = problem.memory[problem.of(option)].reshape(-1, size, problem.memory.shape[1])
        if (cost != cost[0]).any() or (memory != memory[0]).any():
            return every
    units = np.where(problem.spread == Spread.ALL, 0, problem.shards)
    units = np.where(np.isin(problem.spread, (Spread.HOST, Spread.HOSTS)), problem.shards // size, units)
    units = np.where(problem.spread == Spread.WITHIN, 1, units)
    needed = np.maximum.reduceat(np.where(used, units, 0), problem.option_start[:-1])
    order = np.argsort(-np.minimum.reduceat(options.total, problem.option_start[:-1]), kind="stable")
    names = np.empty(problem.tables, np.int64)
    names[order] = np.minimum(np.cumsum(needed[order]) * size, problem.ranks)
    return names

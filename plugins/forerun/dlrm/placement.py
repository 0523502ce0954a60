"""Tables on ranks while a plan is being made: what lies where, what is free, and the best place for one more option."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forerun.dlrm.problem import Plan, Problem, Spread, make_plan

__all__ = ["Place", "Placement"]


class Place(NamedTuple):
    """Ranks for an option."""

    ranks: NDArray[np.int64]  # [shards of the option]
    peak: float  # ms: the largest load of these ranks afterwards


class Placement:
    """Loads and free memory of the ranks, tables put and taken one by one.

    Args:
        problem: A problem without groups (`merge`); host groups are kept: the first table of one that does not lie on
            all ranks decides the host.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.load = problem.base.copy()  # [R] ms
        self.free = problem.capacity.copy()  # [R, M] bytes
        self.option = np.full(problem.tables, -1)
        self.ranks: list[NDArray[np.int64]] = [np.zeros(0, np.int64)] * problem.tables
        self._on_host: dict[int, list[int]] = {}  # host group -> its tables that lie on one host
        free_to_move = np.isin(problem.spread, (Spread.ANY, Spread.WITHIN))
        free_to_move |= (problem.spread == Spread.APART) & (problem.shards == 1)
        self.first_slot = np.full(len(problem.spread), -1)  # [O] where an option's shards lie in the arrays below
        movable = np.flatnonzero(np.repeat(free_to_move, problem.shards))
        counts = np.where(free_to_move, problem.shards, 0)
        self.first_slot[free_to_move] = (np.cumsum(counts) - counts)[free_to_move]
        self.slot_cost = problem.cost[movable]
        self.slot_memory = problem.memory[movable]
        slot_option = np.repeat(np.arange(len(problem.spread)), counts)
        self.slot_table = problem.table[slot_option]
        self.slot_shard = np.arange(len(movable)) - self.first_slot[slot_option]
        tied = (problem.spread[slot_option] == Spread.WITHIN) & (problem.shards[slot_option] > 1)
        self.slot_tied = tied | (problem.host_group[self.slot_table] >= 0)  # stays on its host
        self.slot_rank = np.full(len(movable), -1)

    @property
    def rating(self) -> float:
        """The largest load (ms)."""
        return float(self.load.max())

    def put(self, table: int, option: int, ranks: NDArray[np.int64]) -> None:
        """Puts a table that is on no rank."""
        shards = self.problem.of(option)
        np.add.at(self.load, ranks, self.problem.cost[shards])
        np.subtract.at(self.free, ranks, self.problem.memory[shards])
        self.option[table], self.ranks[table] = option, ranks
        if (slot := int(self.first_slot[option])) >= 0:
            self.slot_rank[slot : slot + len(ranks)] = ranks
        if (group := int(self.problem.host_group[table])) >= 0 and self.problem.spread[option] != Spread.ALL:
            self._on_host.setdefault(group, []).append(table)

    def take(self, table: int) -> tuple[int, NDArray[np.int64]]:
        """Takes a table off its ranks; returns what `put` needs to undo that."""
        option, ranks = int(self.option[table]), self.ranks[table]
        shards = self.problem.of(option)
        np.subtract.at(self.load, ranks, self.problem.cost[shards])
        np.add.at(self.free, ranks, self.problem.memory[shards])
        self.option[table] = -1
        if (slot := int(self.first_slot[option])) >= 0:
            self.slot_rank[slot : slot + len(ranks)] = -1
        if (group := int(self.problem.host_group[table])) >= 0 and self.problem.spread[option] != Spread.ALL:
            self._on_host[group].remove(table)
        return option, ranks

    def find(self, option: int, host: int = -1, snug: float = 0.0) -> Place | None:
        """Where the option loads its ranks least, shard by shard, the dearest first; None if its memory fits nowhere.

        Args:
            option: Of a table that is on no rank.
            host: The host to use, where the option lies on one; -1: any, or the one of its host group.
            snug: A load (ms): ranks that end below it are taken the fullest first, which keeps others free for what is
                large; 0: always the emptiest.

        Source: longest processing time first: Graham, Bounds on Multiprocessing Timing Anomalies, 1969.
        """
        problem, spread = self.problem, self.problem.spread[option]
        shards = problem.of(option)
        cost, memory = problem.cost[shards], problem.memory[shards]
        if spread == Spread.ALL:
            if (memory > self.free).any():
                return None
            return Place(np.arange(problem.ranks), float((self.load + cost).max()))
        if host < 0:
            host = self.host_of(int(problem.table[option]))
        if spread in (Spread.HOST, Spread.HOSTS):
            return self._on_hosts(cost, memory, host, snug)
        together = spread == Spread.WITHIN or problem.host_group[problem.table[option]] >= 0
        if host < 0 and (not together or len(cost) == 1):
            return self._on_ranks(cost, memory, np.arange(problem.ranks), spread == Spread.APART, snug)
        best: Place | None = None
        for ranks in problem.hosts if host < 0 else problem.hosts[host : host + 1]:
            place = self._on_ranks(cost, memory, ranks, spread == Spread.APART, snug)
            if place and (best is None or place.peak < best.peak):
                best = place
        return best

    def tables_on(self, rank: int) -> NDArray[np.int64]:
        """The tables that have a shard on the rank, in order."""
        spread = np.where(self.option >= 0, self.problem.spread[self.option], -1)
        mask = spread == Spread.ALL
        mask[self.slot_table[self.slot_rank == rank]] = True
        rest = (spread == Spread.HOST) | (spread == Spread.HOSTS) | (spread == Spread.APART)
        for table in np.flatnonzero(rest).tolist():
            mask[table] = rank in self.ranks[table].tolist()
        return np.flatnonzero(mask)

    def plan(self) -> Plan:
        """The plan so far, once every table is put."""
        return make_plan(self.problem, self.option.copy(), [ranks.copy() for ranks in self.ranks])

    def copy_from(self, plan: Plan) -> None:
        """Puts all tables as the plan does, off all ranks that they were on."""
        for table in np.flatnonzero(self.option >= 0).tolist():
            self.take(table)
        self.load = self.problem.base.copy()  # exact again after many sums
        for table, (option, ranks) in enumerate(zip(plan.option.tolist(), plan.ranks, strict=True)):
            self.put(table, option, ranks)

    def host_of(self, table: int) -> int:
        """The host that a table's host group has taken, or -1."""
        for other in self._on_host.get(int(self.problem.host_group[table]), ()):
            return int(self.problem.host_index[self.ranks[other][0]])
        return -1

    def _on_ranks(
        self,
        cost: NDArray[np.float64],
        memory: NDArray[np.int64],
        among: NDArray[np.int64],
        apart: bool,
        snug: float,
    ) -> Place | None:
        everywhere = len(among) == len(self.load)
        load = self.load if everywhere else self.load[among]
        free = self.free if everywhere else self.free[among]
        if len(cost) == 1:
            after = np.where((free >= memory[0]).all(1), load + cost[0], np.inf)
            rank = _pick(after, snug)
            peak = float(after[rank])
            return Place(among[rank : rank + 1], peak) if peak < np.inf else None
        for key in (cost, memory.max(1)) if (memory != memory[0]).any() else (cost,):
            # The dearest shard first; the largest first if memory runs out that way.
            if place := _greedy(load.copy(), free.copy(), cost, memory, np.argsort(-key, kind="stable"), apart, snug):
                return Place(among[place.ranks], place.peak)
        return None

    def _on_hosts(self, cost: NDArray[np.float64], memory: NDArray[np.int64], host: int, snug: float) -> Place | None:
        """In order on one host, or on several: each part on the host that it loads least, no host twice before all."""
        hosts = self.problem.hosts
        shards = len(cost)
        choice = [h for h, ranks in enumerate(hosts) if shards % len(ranks) == 0 and (host in (-1, h))]
        one = [h for h in choice if len(hosts[h]) == shards]
        if one or host >= 0:
            choice = one
        if not choice:
            return None
        size = len(hosts[choice[0]])
        rows = np.array([hosts[h] for h in choice])  # [H, size]
        load, free = self.load[rows], self.free[rows]
        used = np.zeros(len(choice), np.int64)
        chosen, peak = np.zeros((shards // size, size), np.int64), 0.0
        parts = cost.reshape(-1, size)
        for part in np.argsort(-parts.max(1), kind="stable").tolist():
            mine, bytes_ = parts[part], memory[part * size : (part + 1) * size]
            after = np.where((free >= bytes_).all((1, 2)), (load + mine).max(1), np.inf)
            after[used > used.min()] = np.inf
            best = _pick(after, snug)
            if after[best] == np.inf:
                return None
            peak = max(peak, float(after[best]))
            used[best] += 1
            load[best] += mine
            free[best] -= bytes_
            chosen[part] = rows[best]
        return Place(chosen.ravel(), peak)


def _pick(after: NDArray[np.float64], snug: float) -> int:
    """The fullest that ends below `snug`, or else the emptiest."""
    if snug > 0 and after.min() <= snug:
        return int(np.where(after <= snug, after, -1.0).argmax())
    return int(after.argmin())


def _greedy(
    load: NDArray[np.float64],
    free: NDArray[np.int64],
    cost: NDArray[np.float64],
    memory: NDArray[np.int64],
    order: NDArray[np.int64],
    apart: bool,
    snug: float,
) -> Place | None:
    """Shards in this order, each on the emptiest rank that has the memory; `load` and `free` are used up."""
    chosen, peak = np.zeros(len(cost), np.int64), 0.0
    closed = np.zeros(len(load))
    for shard in order.tolist():
        after = np.where((free >= memory[shard]).all(1), load + (closed + cost[shard]), np.inf)
        rank = _pick(after, snug)
        if after[rank] == np.inf:
            return None
        chosen[shard] = rank
        load[rank] += cost[shard]
        free[rank] -= memory[shard]
        peak = max(peak, float(load[rank]))
        if apart:
            closed[rank] = np.inf
    return Place(chosen, peak)

"""torchrec's sharding options as a `Problem`, and plans back as sharding options on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from forerun.dlrm.infeasible import Infeasible
from forerun.dlrm.problem import Plan, Problem
from forerun.dlrm.report import Sharding
from forerun.dlrm.spread import Spread
from forerun_adapters import torchrec as host

__all__ = ["SearchSpace", "sharding_of"]

_MB = 1024**2

# Where two options of a table are the same but for their name, the one that comes first here stays.
_PLAINEST = (
    "table_wise",
    "row_wise",
    "table_row_wise",
    "column_wise",
    "table_column_wise",
    "grid_shard",
    "data_parallel",
)


class SearchSpace:
    """The options of every table, on the ranks of a topology from which other memory is taken off already.

    The options of a table are sorted, so that the same input gives the same problem in every process (some releases of
    torchrec list them in the order of a set).

    Raises:
        PlannerError: A table has no option that fits the number of ranks and hosts, or an estimate is not a finite,
            positive number.
    """

    def __init__(self, options: Sequence[Any], topology: Any) -> None:
        hosts = host.host_of(topology)
        self.tiers: tuple[str, ...] = host.TIERS
        size = hosts.count(hosts[0])
        shared = _shared(options)
        tables: dict[str, list[Any]] = {}
        for option in options:
            tables.setdefault(option.fqn, []).append(option)
        kept: list[list[Any]] = []
        for name, choices in tables.items():
            usable = [c for c in choices if _placeable(c, len(hosts), size, shared)]
            if not usable:
                raise host.planner_error(
                    "STRICT_CONSTRAINTS",
                    f"table {name!r} has {len(choices)} sharding options, none of which fits {len(hosts)} ranks in "
                    f"hosts of {size}: {sorted({c.sharding_type for c in choices})}",
                )
            kept.append(_distinct(sorted(usable, key=_order)))
        self.names = tuple(tables)
        self._alike: dict[tuple[str, str, str], list[Any]] = {}
        for option in options:
            self._alike.setdefault((option.fqn, option.sharding_type, option.compute_kernel), []).append(option)
        self.options = [option for choices in kept for option in choices]
        self.problem = self._problem([len(choices) for choices in kept], hosts, topology, shared)

    def _problem(self, choices: list[int], hosts: list[int], topology: Any, shared: dict[str, int]) -> Problem:
        cost = np.array([shard.perf.total for option in self.options for shard in option.shards], float)
        memory = np.array([host.tiers(s.storage) for o in self.options for s in o.shards], float).reshape(len(cost), -1)
        counts = np.array([len(option.shards) for option in self.options], np.int64)
        wrong = ~np.isfinite(cost) | (cost < 0) | (~np.isfinite(memory) | (memory < 0)).any(1)
        if wrong.any():
            option = self.options[int(np.repeat(np.arange(len(counts)), counts)[np.argmax(wrong)])]
            raise host.planner_error(
                "INPUT_VALIDATION",
                f"table {option.fqn!r} ({option.sharding_type}, {option.compute_kernel}): the estimators gave a shard "
                "a cost or a number of bytes that is negative or not finite; see its pooling factors",
            )
        first = np.cumsum([0, *choices])
        return Problem(
            option_start=first,
            shard_start=np.concatenate([[0], np.cumsum(counts)]),
            spread=np.array([Spread[host.spread_name(option)] for option in self.options], np.int8),
            cost=cost,
            memory=np.ceil(memory).astype(np.int64),
            capacity=np.array([host.tiers(device.storage) for device in topology.devices], np.int64),
            host=np.array(hosts, np.int64),
            host_group=np.array([shared.get(self.options[o].dependency, -1) for o in first[:-1].tolist()], np.int64),
        )

    def placed(self, plan: Plan) -> list[Any]:
        """The options that a plan chooses, as copies with the ranks of their shards set."""
        return [
            host.shard_on_ranks(self.options[option], ranks.tolist())
            for option, ranks in zip(plan.option.tolist(), plan.ranks, strict=True)
        ]

    def explain(self, lack: Infeasible) -> str:
        """Why there is no plan: table, tier, missing bytes, and the smallest change that was seen to fit."""
        tier = self.tiers[lack.tier].upper()
        verdict = "no plan fits" if lack.proven else "no plan was found that fits"
        enough = lack.enough
        change = (
            "no amount of one kind of memory alone is enough: allow more sharding types or kernels, or add ranks"
            if enough is None
            else f"{enough} bytes ({enough / _MB:.1f} MiB) more {tier} on each of {self.problem.ranks} ranks are enough"
        )
        size = f"{lack.missing} bytes ({lack.missing / _MB:.1f} MiB)"
        return f"{verdict}: table {self.names[lack.table]!r} lacks {size} of {tier}; {change}"

    def shardings(self, plan: Any) -> tuple[Sharding, ...]:
        """What the tables of a `ShardingPlan` cost here.

        Raises:
            ValueError: The plan lacks a table, or shards one in a way that is none of its options.
        """
        found: dict[str, Sharding] = {}
        for how in host.sharded_tables(plan):
            name = f"{how.path}.{how.name}"
            for option in self._alike.get((name, how.sharding_type, how.compute_kernel), ()):
                sizes = tuple(tuple(shard.size) for shard in option.shards)
                if len(sizes) == len(how.ranks) and how.sizes in (None, sizes):
                    found[name] = sharding_of(host.shard_on_ranks(option, how.ranks))
                    break
            else:
                raise ValueError(f"table {name!r}: {how.sharding_type}, {how.compute_kernel} is none of its options")
        if missing := set(self.names) - set(found):
            raise ValueError(f"the plan has no sharding of {sorted(missing)}")
        return tuple(found[name] for name in self.names)


def sharding_of(option: Any) -> Sharding:
    """How an option whose shards have ranks shards its table."""
    return Sharding(
        option.fqn,
        option.sharding_type,
        option.compute_kernel,
        tuple(shard.rank for shard in option.shards),
        tuple(float(shard.perf.total) for shard in option.shards),
        tuple(host.tiers(shard.storage) for shard in option.shards),
    )


def _order(option: Any) -> tuple[int, str, str, int]:
    plain = _PLAINEST.index(option.sharding_type) if option.sharding_type in _PLAINEST else len(_PLAINEST)
    return plain, option.sharding_type, option.compute_kernel, len(option.shards)


def _distinct(options: list[Any]) -> list[Any]:
    """Without those that cost, take and may lie as one before them: a table too narrow to split by columns has some."""
    kept: dict[Any, Any] = {}
    for option in options:
        spread = Spread[host.spread_name(option)]
        if len(option.shards) == 1 and spread in (Spread.WITHIN, Spread.APART):
            spread = Spread.ANY
        key = (spread, tuple((s.perf.total, host.tiers(s.storage)) for s in option.shards))
        kept.setdefault(key, option)
    return list(kept.values())


def _shared(options: Sequence[Any]) -> dict[str, int]:
    """A number for every dependency that several tables have: torchrec places them on one host."""
    tables: dict[str, set[str]] = {}
    for option in options:
        if option.dependency:
            tables.setdefault(option.dependency, set()).add(option.fqn)
    return {dependency: n for n, (dependency, names) in enumerate(tables.items()) if len(names) > 1}


def _placeable(option: Any, ranks: int, size: int, shared: dict[str, int]) -> bool:
    """Whether torchrec's partitioner could place the option on empty ranks of unlimited memory."""
    spread, shards = Spread[host.spread_name(option)], len(option.shards)
    if spread == Spread.HOSTS:
        return shards % size == 0 and ranks % size == 0 and option.dependency not in shared
    return {Spread.ALL: shards == ranks, Spread.HOST: shards == size, Spread.APART: shards <= ranks}.get(spread, True)

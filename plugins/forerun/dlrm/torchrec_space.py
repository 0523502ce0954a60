"""torchrec's sharding options as a `Problem`, and plans back as sharding options on ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from forerun.dlrm.infeasible import Infeasible
from forerun.dlrm.problem import Plan, Problem
from forerun.dlrm.report import Sharding
from forerun.dlrm.spread import Spread
from forerun.dlrm.torchrec_enumerator import PLAINEST
from forerun_adapters import torchrec as host

__all__ = ["SearchSpace", "sharding_of"]

_MB = 1024**2


class SearchSpace:
    """The options of every table, on the ranks of a topology from which other memory is taken off already.

    The options of a table are sorted, so that the same input gives the same problem in every process (some releases of
    torchrec list them in the order of a set).

    Raises:
        PlannerError: A table has no option that fits the number of ranks and hosts, or an estimate is not a finite,
            positive number.

    Args:
        options: torchrec's, estimated.
        topology: Its ranks.
        cost: What counts of a shard's `Perf` (ms).
    """

    def __init__(self, options: Sequence[Any], topology: Any, cost: Callable[[Any], float]) -> None:
        self._cost = cost
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
            kept.append(
                _distinct(
                    [_Measured(c, Spread[host.spread_name(c)], _runs(c, cost)) for c in sorted(usable, key=_order)]
                )
            )
        self.names = tuple(tables)
        self._alike: dict[tuple[str, str, str], list[Any]] = {}
        for option in options:
            self._alike.setdefault(_name(option), []).append(option)
        measured = [option for choices in kept for option in choices]
        self.options = [option.option for option in measured]
        self.problem = self._problem(measured, [len(choices) for choices in kept], hosts, topology, shared)

    def _problem(
        self, measured: list[_Measured], choices: list[int], hosts: list[int], topology: Any, shared: dict[str, int]
    ) -> Problem:
        runs = [run for option in measured for run in option.runs]
        alike = [run.shards for run in runs]
        cost = np.repeat(np.array([run.cost for run in runs], float), alike)
        memory = np.repeat(np.array([run.memory for run in runs], float), alike, axis=0)
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
            spread=np.array([option.spread for option in measured], np.int8),
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

    def lists(self, plan: Sequence[Any]) -> bool:
        """Whether all options of a plan are listed ones: a proposer, or a callback, may make some of its own."""
        return all(
            any(_runs(option, self._cost) == _runs(listed, self._cost) for listed in self._alike.get(_name(option), ()))
            for option in plan
        )

    def explain(self, lack: Infeasible, *, proven: bool) -> str:
        """Why there is no plan: table, tier, missing bytes, and the smallest change that was seen to fit.

        Args:
            lack: What the search says.
            proven: Whether no plan exists, or none was found.
        """
        tier = self.tiers[lack.tier].upper()
        verdict = "no plan fits" if proven else "no plan was found that fits"
        enough = lack.enough
        if enough is not None:
            ranks = self.problem.ranks
            change = f"{enough} bytes ({enough / _MB:.1f} MiB) more {tier} on each of {ranks} ranks are enough"
        elif lack.hurried:
            change = "the time limit came before it was known what would be enough"
        else:
            change = (
                "no amount of one kind of memory alone is enough: allow more sharding types or kernels, or add ranks"
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
                    found[name] = sharding_of(host.shard_on_ranks(option, how.ranks), self._cost)
                    break
            else:
                raise ValueError(f"table {name!r}: {how.sharding_type}, {how.compute_kernel} is none of its options")
        if missing := set(self.names) - set(found):
            raise ValueError(f"the plan has no sharding of {sorted(missing)}")
        return tuple(found[name] for name in self.names)


class _Run(NamedTuple):
    """Neighbouring shards of an option that cost and take the same."""

    cost: float  # ms of each
    memory: tuple[int, ...]  # bytes of each, in each tier
    shards: int


class _Measured(NamedTuple):
    """An option of torchrec's with what it costs, takes, and where it may lie."""

    option: Any
    spread: Spread
    runs: tuple[_Run, ...]


def sharding_of(option: Any, cost: Callable[[Any], float]) -> Sharding:
    """How an option whose shards have ranks shards its table; `cost` as `SearchSpace` takes it."""
    runs = _runs(option, cost)
    return Sharding(
        option.fqn,
        option.sharding_type,
        option.compute_kernel,
        tuple(shard.rank for shard in option.shards),
        tuple((*shard.offset, *shard.size) for shard in option.shards),
        tuple(chain.from_iterable([run.cost] * run.shards for run in runs)),
        tuple(chain.from_iterable([run.memory] * run.shards for run in runs)),
    )


def _name(option: Any) -> tuple[str, str, str]:
    return option.fqn, option.sharding_type, option.compute_kernel


def _runs(option: Any, cost: Callable[[Any], float]) -> tuple[_Run, ...]:
    runs: list[tuple[float, tuple[int, ...]]] = []
    counts: list[int] = []
    perf = storage = None
    for shard in option.shards:
        if shard.perf is not perf or shard.storage is not storage:
            perf, storage = shard.perf, shard.storage
            size = (cost(perf), host.tiers(storage))
            if not runs or runs[-1] != size:
                runs.append(size)
                counts.append(0)
        counts[-1] += 1
    return tuple(_Run(*size, count) for size, count in zip(runs, counts, strict=True))


def _order(option: Any) -> tuple[int, str, str, int]:
    plain = PLAINEST.index(option.sharding_type) if option.sharding_type in PLAINEST else len(PLAINEST)
    return plain, option.sharding_type, option.compute_kernel, len(option.shards)


def _distinct(options: list[_Measured]) -> list[_Measured]:
    """Without those that cost, take and may lie as one before them: a table too narrow to split by columns has some."""
    kept: dict[Any, _Measured] = {}
    for option in options:
        alone = len(option.option.shards) == 1 and option.spread in (Spread.WITHIN, Spread.APART)
        kept.setdefault((Spread.ANY if alone else option.spread, option.runs), option)
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

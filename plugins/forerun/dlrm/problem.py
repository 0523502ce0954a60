"""What is to be planned: for every table, which option to take and on which ranks to put its shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forerun.dlrm.check import check_plan, check_problem
from forerun.dlrm.spread import Spread

__all__ = ["Loads", "Plan", "Problem", "Spread", "loads", "make_plan", "validate"]


def _not_given() -> NDArray[np.int64]:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Problem:
    """Tables, their options, the options' shards, and the ranks that take them.

    Shards lie option by option, options table by table: `shard_start[o]:shard_start[o + 1]` are the shards of option
    o, `option_start[f]:option_start[f + 1]` the options of table f.

    Args:
        option_start: `[F + 1]`.
        shard_start: `[O + 1]`.
        spread: `[O]` of `Spread`.
        cost: `[S]` what a shard adds to the rating of its rank (ms).
        memory: `[S, M]` bytes of each tier (HBM, DDR, ...) that it takes.
        capacity: `[R, M]` bytes of each tier that a rank has.
        host: `[R]` the host of each rank; ranks of a host are next to each other.
        base: `[R]` rating that a rank has before any table (ms); empty: 0.
        group: `[F]` tables of one number >= 0 take options of one spread with equally many shards, which go to the same
            ranks, shard by shard (co-location); -1: on their own; empty: all on their own.
        host_group: `[F]` tables of one number >= 0 go to the same host, but for those that lie on all ranks (torchrec's
            dependency: the tables of an embedding tower); -1: on their own; empty: all on their own.

    Raises:
        ValueError: The arrays do not fit together; the message says what came and what was expected.
    """

    option_start: NDArray[np.int64]
    shard_start: NDArray[np.int64]
    spread: NDArray[np.int8]
    cost: NDArray[np.float64]
    memory: NDArray[np.int64]
    capacity: NDArray[np.int64]
    host: NDArray[np.int64]
    base: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    group: NDArray[np.int64] = field(default_factory=_not_given)
    host_group: NDArray[np.int64] = field(default_factory=_not_given)

    def __post_init__(self) -> None:
        def array(name: str, kind: type, shape: tuple[int | None, ...]) -> None:
            given: ArrayLike = getattr(self, name)
            value = np.asarray(given)
            if value.ndim != len(shape) or any(
                n is not None and n != m for n, m in zip(shape, value.shape, strict=True)
            ):
                raise ValueError(f"{name} has shape {list(value.shape)}; expected {list(shape)} (None: any length)")
            if kind is not np.float64 and value.size and value.dtype.kind not in "iu":
                raise ValueError(f"{name} has dtype {value.dtype}; expected integers")
            object.__setattr__(self, name, np.ascontiguousarray(value, kind))

        array("option_start", np.int64, (None,))
        array("shard_start", np.int64, (None,))
        for name in ("option_start", "shard_start"):
            starts = getattr(self, name)
            if len(starts) == 0 or starts[0] != 0 or (np.diff(starts) < 1).any():
                what = "table without an option" if name == "option_start" else "option without a shard"
                raise ValueError(f"{name} must begin with 0 and rise: it has a {what}, or does not begin with 0")
        tables, options = len(self.option_start) - 1, int(self.option_start[-1])
        if len(self.shard_start) - 1 != options:
            raise ValueError(
                f"shard_start has {len(self.shard_start)} entries; expected {options + 1}, one per option + 1"
            )
        array("spread", np.int8, (options,))
        array("cost", np.float64, (int(self.shard_start[-1]),))
        array("capacity", np.int64, (None, None))
        ranks, tiers = self.capacity.shape
        array("memory", np.int64, (int(self.shard_start[-1]), tiers))
        array("host", np.int64, (ranks,))
        for name, kind, length, fill in (
            ("base", np.float64, ranks, 0),
            ("group", np.int64, tables, -1),
            ("host_group", np.int64, tables, -1),
        ):
            if np.size(getattr(self, name)) == 0:
                object.__setattr__(self, name, np.full(length, fill, kind))
            array(name, kind, (length,))
        check_problem(self)

    @property
    def tables(self) -> int:
        """Number of tables, F."""
        return len(self.option_start) - 1

    @property
    def ranks(self) -> int:
        """Number of ranks, R."""
        return len(self.capacity)

    @cached_property
    def table(self) -> NDArray[np.int64]:
        """`[O]` the table of each option."""
        return np.repeat(np.arange(self.tables), np.diff(self.option_start))

    @cached_property
    def shards(self) -> NDArray[np.int64]:
        """`[O]` the number of shards of each option."""
        return np.diff(self.shard_start)

    @cached_property
    def hosts(self) -> tuple[NDArray[np.int64], ...]:
        """Per host, in order, its ranks."""
        cuts = np.flatnonzero(np.diff(self.host)) + 1
        return tuple(np.split(np.arange(self.ranks), cuts))

    @cached_property
    def host_index(self) -> NDArray[np.int64]:
        """`[R]` the position in `hosts` of each rank's host."""
        return np.cumsum(np.diff(self.host, prepend=self.host[:1]) != 0)

    def of(self, option: int) -> slice:
        """The shards of an option."""
        return slice(int(self.shard_start[option]), int(self.shard_start[option + 1]))


@dataclass(frozen=True, eq=False)
class Plan:
    """A choice for every table.

    Args:
        option: `[F]` the chosen option.
        ranks: Per table, the ranks of that option's shards, in order.
        rating: The largest sum of costs of a rank (ms): what a step waits for.
    """

    option: NDArray[np.int64]
    ranks: tuple[NDArray[np.int64], ...]
    rating: float


class Loads(NamedTuple):
    """What a plan puts on each rank."""

    cost: NDArray[np.float64]  # [R] ms, base included
    memory: NDArray[np.int64]  # [R, M] bytes


def loads(problem: Problem, plan: Plan) -> Loads:
    """What the plan puts on each rank.

    The plain equivalent::

        for f in tables:
            for shard, rank in zip(shards_of(plan.option[f]), plan.ranks[f]):
                cost[rank] += problem.cost[shard]; memory[rank] += problem.memory[shard]
    """
    return _loads(problem, plan.option, plan.ranks)


def make_plan(problem: Problem, option: ArrayLike, ranks: Sequence[ArrayLike]) -> Plan:
    """A plan with its rating computed.

    Raises:
        ValueError: As `validate`, memory included.
    """
    chosen = np.asarray(option, np.int64)
    placed = tuple(np.asarray(r, np.int64) for r in ranks)
    validate(problem, Plan(chosen, placed, np.nan))
    return Plan(chosen, placed, float(_loads(problem, chosen, placed).cost.max()))


def validate(problem: Problem, plan: Plan) -> None:
    """Returns if the plan keeps to the problem.

    Raises:
        ValueError: A table lacks an option of its own, a shard lies off the ranks that its option allows, a group is
            not together, a rank's memory is exceeded, or the rating (unless NaN) is not that of the plan.
    """
    check_plan(problem, plan)
    cost, memory = loads(problem, plan)
    if (memory > problem.capacity).any():
        rank, tier = (int(i) for i in np.argwhere(memory > problem.capacity)[0])
        raise ValueError(
            f"rank {rank}, tier {tier}: {memory[rank, tier]} bytes exceed its {problem.capacity[rank, tier]} bytes"
        )
    if not np.isnan(plan.rating) and not np.isclose(plan.rating, cost.max(), rtol=1e-9, atol=1e-12):
        raise ValueError(f"the plan says rating {plan.rating}, but rates {cost.max()}")


def _loads(problem: Problem, option: NDArray[np.int64], ranks: Sequence[NDArray[np.int64]]) -> Loads:
    cost, memory = problem.base.copy(), np.zeros_like(problem.capacity)
    for chosen, placed in zip(option.tolist(), ranks, strict=True):
        shards = problem.of(chosen)
        np.add.at(cost, placed, problem.cost[shards])
        np.add.at(memory, placed, problem.memory[shards])
    return Loads(cost, memory)

"""A planner for torchrec with a proven gap: stands wherever `EmbeddingShardingPlanner` stands.

torchrec calls `plan` or `collective_plan`; everything around the search is torchrec's own code: storage reservation,
plan loader, callbacks, statistics, validation, errors. Listing the options is quicker
(`forerun.dlrm.torchrec_enumerator`), and which option each table takes, on which ranks, is found by
`forerun.dlrm.best`, for the least largest sum of `Perf.total` of a rank: what torchrec's performance model rates.

What a user gives counts:

- an enumerator, estimators, a storage reservation, statistics, callbacks: used as torchrec uses them;
- a performance model: torchrec's own search runs as well, and the model decides between its plans and this one;
- proposers: theirs are tried as well, after this planner's plan; the best rating wins;
- a partitioner other than `GreedyPerfPartitioner`: it may keep to rules that nobody else knows, so torchrec's search
  runs with it, and this one does not; the report says so, and says how far from the bound its plan is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from forerun.dlrm.best import best_plan
from forerun.dlrm.bound import lower_bound
from forerun.dlrm.garbage import kept
from forerun.dlrm.infeasible import Infeasible
from forerun.dlrm.report import Report, Sharding
from forerun.dlrm.torchrec_clock import Clock
from forerun.dlrm.torchrec_enumerator import FastEnumerator
from forerun.dlrm.torchrec_group import from_first_rank
from forerun.dlrm.torchrec_inputs import check_constraints, check_group, check_objective, check_tables
from forerun.dlrm.torchrec_objective import COSTS, CorrectedModel, Objective, corrected
from forerun.dlrm.torchrec_search import CorePartitioner, CoreProposer, ProposerWhile
from forerun.dlrm.torchrec_space import SearchSpace, sharding_of
from forerun_adapters import torchrec as host

__all__ = ["DLRMPlanner"]

_SMALL = 600  # options; up to here torchrec's own search takes seconds, and is tried too unless the gap is 0


class _Last:
    """What is known of the last plan."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.options: list[Any] | None = None
        self.left_out = 0  # options that the time limit left out of them
        self.space: SearchSpace | None = None
        self.bound: float | None = None  # of all plans of these options (ms)
        self.proven = False  # whether there is nothing left to find: no better plan, or none at all
        self.places: set[tuple[Any, ...]] | None = None  # of the plan that this planner's own search found
        self.shortage: str | None = None


class DLRMPlanner(host.EmbeddingShardingPlanner):  # type: ignore[misc]
    """Plans embedding sharding; `report` says how good the last plan is.

    Args:
        topology: As torchrec's planner takes it, and all arguments up to `plan_loader`.
        timeout_seconds: Listing the options counts too: those that are not estimated after half of the time are
            left out, the plainest of each table last. A user's own enumerator is not cut short.
        strict: Constraints that name no table, or one of several modules, are errors; else they are warnings.
        asks_torchrec: Whether torchrec's own search runs as well, and the better plan is taken. None: where it takes
            seconds (up to 600 options), or where this one found no plan, or with a performance model of the user's;
            never where the plan is proven best. Without it a plan may be worse than torchrec's by the gap at most.
        objective: What plans are rated by: torchrec's rating, or that "corrected" for the travel of ids and for
            all-reduces within a host (`forerun.dlrm.torchrec_objective`).

    Sequential equivalent::

        EmbeddingShardingPlanner(…).plan(module, sharders)
    """

    report: Report | None
    _num_plans: int
    _perf_model: Any
    _partitioner: Any
    _proposers: list[Any]
    _best_plan: list[Any] | None

    def __init__(
        self,
        topology: Any = None,
        batch_size: int | None = None,
        enumerator: Any = None,
        storage_reservation: Any = None,
        proposer: Any = None,
        partitioner: Any = None,
        performance_model: Any = None,
        stats: Any = None,
        constraints: Mapping[str, Any] | None = None,
        debug: bool = True,
        callbacks: Sequence[Callable[[list[Any]], list[Any]]] | None = None,
        timeout_seconds: float | None = None,
        plan_loader: Any = None,
        *,
        strict: bool = False,
        asks_torchrec: bool | None = None,
        objective: Objective = "torchrec",
    ) -> None:
        check_constraints(constraints)
        check_objective(objective, COSTS, performance_model, enumerator)
        super().__init__(
            topology=topology,
            batch_size=batch_size,
            enumerator=enumerator,
            storage_reservation=storage_reservation,
            proposer=proposer,
            partitioner=partitioner,
            performance_model=performance_model,
            stats=stats,
            constraints=constraints,
            debug=debug,
            callbacks=callbacks,
            timeout_seconds=timeout_seconds,
            plan_loader=plan_loader,
        )
        self._objective = objective
        if objective == "corrected":
            self._perf_model = CorrectedModel(self._topology)
        if enumerator is None:
            priced = corrected(self._topology) if objective == "corrected" else self._topology
            self._enumerator = FastEnumerator(topology=priced, batch_size=self._batch_size, constraints=constraints)
            self._enumerator.shares = not (proposer or partitioner or performance_model or callbacks)
        self._strict = strict
        self._makespan = objective == "corrected" or host.is_makespan(self._perf_model)
        self._searches = host.is_greedy(self._partitioner)
        self._asks_torchrec = asks_torchrec
        self._asks_always = bool(proposer) or not self._makespan
        core = CoreProposer(self._seen, proposes=self._searches)
        if self._searches:
            self._partitioner = CorePartitioner(core, self._solve, self._partitioner)
        self._proposers = [core, *(ProposerWhile(p, self._tries_more) for p in self._proposers)]
        self._last = _Last(Clock())
        self.report = None

    def plan(self, module: Any, sharders: list[Any]) -> Any:
        """A sharding plan for the module; `report` says how good it is.

        Raises:
            PlannerError: As torchrec's planner, and for input that it takes in silence. Where nothing fits the message
                begins with the table, the memory that is missing, and the smallest change that was found to fit.
        """
        self._last, self._best_plan, self.report = _Last(Clock(self._timeout_seconds)), None, None
        check_constraints(self._constraints)
        if isinstance(self._enumerator, FastEnumerator):
            self._enumerator.clock = self._last.clock
        with kept():
            plan = self._planned(module, sharders)
            best: list[Any] = self._best_plan or []
            if not best:
                check_tables([], self._constraints, strict=self._strict)
            self.report = self._reported(tuple(sharding_of(option, self._cost) for option in best), *self._rated(best))
        return plan

    def _planned(self, module: Any, sharders: list[Any]) -> Any:
        """torchrec's own `plan`, with the search of this one in it."""
        try:
            return super().plan(module, sharders)
        except Exception as error:
            kind = host.no_plan(error) if self._num_plans == 0 else None
            if self._last.shortage is None or kind is None:
                raise
            raise host.planner_error(kind, f"{self._last.shortage}\n{error}") from error

    def collective_plan(
        self, module: Any, sharders: list[Any] | None = None, pg: dist.ProcessGroup | None = None
    ) -> Any:
        """Plans on rank 0 and gives every rank of the group the plan and the report.

        Raises:
            PlannerError: As `plan`, on every rank.
        """
        if pg is None:
            if not dist.is_initialized():
                raise host.planner_error("INPUT_VALIDATION", "no process group: call init_process_group(), or plan()")
            pg = dist.GroupMember.WORLD
        assert pg is not None
        check_group(pg.size(), self._topology)
        sharders = host.default_sharders() if sharders is None else sharders
        plan, self.report = from_first_rank(lambda: (self.plan(module, sharders), self.report), pg)
        return plan

    def get_selected_options(self) -> list[Any]:
        """The options that the last plan took, with ranks; none before a plan."""
        return self._best_plan or []

    def get_search_space(self) -> list[Any] | None:
        """All options of the last plan; None before a plan, and where a loaded plan was taken."""
        return self._last.options

    def rate(self, plan: Any) -> Report:
        """What another `ShardingPlan` of the same module costs on the same ranks, for `forerun.dlrm.diff.difference`.

        Its rating is the largest sum of costs of a rank.

        Raises:
            RuntimeError: Nothing was planned yet.
            ValueError: The plan lacks a table, or shards one in a way that is none of its options.
        """
        if self._last.options is None:
            raise RuntimeError("rate() compares with the last plan: call plan() first")
        given = self._reported(self._the_space().shardings(plan), 0.0, "given")
        return replace(given, rating=max(given.rank_cost))

    def _seen(self, options: Sequence[Any]) -> None:
        """Called when the options of all tables are listed."""
        self._last.options = list(options)
        self._last.clock.listed()
        self._last.left_out = getattr(self._enumerator, "left_out", 0)
        check_tables(options, self._constraints, strict=self._strict)

    def _solve(self, topology: Any) -> list[Any]:
        """The core's plan on ranks whose other memory is taken off."""
        last = self._last
        last.space = space = SearchSpace(last.options or [], topology, self._cost)
        try:
            result = best_plan(space.problem, deadline=self._search_deadline())
        except Infeasible as error:
            last.proven = error.proven and not last.left_out
            last.shortage = space.explain(error, proven=last.proven)
            raise host.planner_error("PARTITION", last.shortage) from None
        if self._makespan:
            last.bound, last.proven = result.bound, result.proven
        placed = space.placed(result.plan)
        last.places = _places(placed)
        return placed

    def _search_deadline(self) -> float | None:
        """When this planner's own search has to be over: half the time is other proposers', where they are asked."""
        deadline = self._last.clock.deadline
        if deadline is None or not (self._asks_always or self._asks_torchrec):
            return deadline
        return (time.monotonic() + deadline) / 2

    def _tries_more(self) -> bool:
        """Whether torchrec's proposers, or the user's, are asked for another proposal."""
        last = self._last
        if not last.clock.searches:
            return False
        if self._asks_always or not self._searches:
            return True
        if last.proven or self._asks_torchrec is not None:
            return not last.proven and bool(self._asks_torchrec)
        return last.places is None or len(last.options or ()) <= _SMALL

    def _the_space(self) -> SearchSpace:
        if self._last.space is None:
            topology = self._storage_reservation.last_reserved_topology
            self._last.space = SearchSpace(self._last.options or [], topology, self._cost)
        return self._last.space

    @property
    def _cost(self) -> Callable[[Any], float]:
        return COSTS[self._objective]

    def _rated(self, best: list[Any]) -> tuple[float, str]:
        """The rating of the plan taken, and who found it."""
        rating = float(self._perf_model.rate(plan=best)) if best else 0.0
        last = self._last
        if last.options is None:
            return rating, "nobody: no table to shard" if not best else "the plan loader"
        ours = _places(best) == last.places  # then its options are listed ones
        search = "forerun" if ours else "torchrec's search"
        if not self._searches:
            if self._makespan and last.clock.searches:
                last.bound = lower_bound(self._the_space().problem)
            search += f", with {type(self._partitioner).__name__}"
        if last.left_out:
            search += f", without {last.left_out} options that the time limit left out"
        if last.left_out or not (ours or self._the_space().lists(best)):
            last.bound = None  # it holds for plans of the options that were listed
        elif last.bound is not None and rating < last.bound <= rating * (1 + 1e-9):
            last.bound = rating  # sums of the same costs in another order
        return rating, search + (" and callbacks" if self._callbacks else "")

    def _reported(self, tables: tuple[Sharding, ...], rating: float, search: str) -> Report:
        last = self._last
        topology = self._storage_reservation.last_reserved_topology or self._topology
        return Report(
            rating=rating,
            bound=last.bound if tables else None,
            seconds=last.clock.seconds,
            enumeration_seconds=last.clock.listing,
            search=search,
            objective=self._objective,
            tables=tables,
            tiers=host.TIERS,
            capacity=tuple(host.tiers(device.storage) for device in topology.devices),
        )


def _places(options: Sequence[Any]) -> set[tuple[Any, ...]]:
    return {
        (o.fqn, o.sharding_type, o.compute_kernel, *((shard.rank, shard.perf.total) for shard in o.shards))
        for o in options
    }

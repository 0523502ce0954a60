"""The planner on the real torchrec: its ratings, its arguments, its errors."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
import time
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner, MemoryBalancedPartitioner
from torchrec.distributed.planner.perf_models import NoopStorageModel
from torchrec.distributed.planner.proposers import UniformProposer
from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.types import Partitioner, PlannerError, PlannerErrorType
from torchrec_models import HOTNESS, SHARDERS, mlperf, module, pooling, small, topology

from forerun.dlrm.diff import difference
from forerun.dlrm.report import Report
from forerun.dlrm.torchrec import DLRMPlanner
from forerun.dlrm.torchrec_enumerator import FastEnumerator

_PROGRAM = Path(__file__).with_name("torchrec_ranks.py")


def stock_rating(made: torch.nn.Module, arguments: dict[str, Any]) -> tuple[float, Any]:
    planner = EmbeddingShardingPlanner(**arguments)
    plan = planner.plan(made, SHARDERS)
    return planner._perf_model.rate(planner._best_plan), plan


def test_mlperf_on_eight_ranks() -> None:
    made, arguments = mlperf(8)
    planner = DLRMPlanner(**arguments)
    planner.plan(made, SHARDERS)
    rating, plan = stock_rating(made, arguments)
    assert rating == pytest.approx(4.1733, abs=1e-4)
    assert planner.report.rating <= 4.0708 * 1.01
    assert 3.78 < planner.report.bound <= planner.report.rating
    stock = planner.rate(plan)  # torchrec's plan in our figures
    assert stock.rating == pytest.approx(rating, rel=1e-12)
    assert difference(stock, planner.report).changed


@pytest.mark.parametrize("ranks, optimum", [(16, 7.0970), (64, 2.4718), (128, 2.2461)])
def test_mlperf_on_more_ranks(ranks: int, optimum: float) -> None:
    made, arguments = mlperf(ranks)
    planner = DLRMPlanner(**arguments)
    planner.plan(made, SHARDERS)
    assert optimum * (1 - 1e-4) <= planner.report.rating <= optimum * 1.06
    assert planner.report.bound <= optimum * (1 + 1e-4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_never_worse_than_torchrec(ranks: int) -> None:
    made, arguments = small(ranks)
    planner = DLRMPlanner(**arguments)
    planner.plan(made, SHARDERS)
    rating, _ = stock_rating(made, arguments)
    assert planner.report.rating <= rating * (1 + 1e-9)
    assert max(planner.report.rank_cost) == pytest.approx(planner.report.rating)


def test_takes_what_torchrec_takes_in_the_same_order() -> None:
    stock = list(inspect.signature(EmbeddingShardingPlanner.__init__).parameters)
    ours = list(inspect.signature(DLRMPlanner.__init__).parameters)
    assert ours[: len(stock)] == stock
    assert isinstance(DLRMPlanner(**small()[1]), EmbeddingShardingPlanner)


def test_the_same_plan_every_time() -> None:
    plans = []
    for _ in range(2):
        made, arguments = mlperf(16)
        plans.append(str(DLRMPlanner(**arguments).plan(made, SHARDERS)))
    assert plans[0] == plans[1]


def test_constraints_are_kept_to() -> None:
    made, arguments = mlperf(16)
    arguments["constraints"]["t0"].sharding_types = ["table_row_wise"]
    arguments["constraints"]["t1"].sharding_types = ["column_wise"]
    arguments["constraints"]["t1"].min_partition = 32
    arguments["constraints"]["t2"].sharding_types = ["row_wise"]
    arguments["constraints"]["t2"].compute_kernels = ["fused_uvm"]
    plan = DLRMPlanner(**arguments).plan(made, SHARDERS).plan["0"]
    assert plan["t0"].sharding_type == "table_row_wise"
    assert plan["t0"].ranks in (list(range(8)), list(range(8, 16)))
    assert (plan["t1"].sharding_type, len(plan["t1"].ranks)) == ("column_wise", 4)
    assert (plan["t2"].sharding_type, plan["t2"].compute_kernel) == ("row_wise", "fused_uvm")
    assert plan["t2"].ranks == list(range(16))


def test_callbacks_statistics_and_what_was_selected() -> None:
    lines: list[str] = []

    class Collects(EmbeddingStats):
        def log(self, **kwargs: Any) -> None:
            lines.append(kwargs["debug_stats"].planner_type)
            super().log(**kwargs)

    def second_first(options: list[Any]) -> list[Any]:
        return [*options[1:], options[0]]

    made, arguments = small(2)
    arguments.update(stats=[Collects()], callbacks=[second_first], debug=True)
    planner = DLRMPlanner(**arguments)
    assert planner.get_selected_options() == []
    assert planner.get_search_space() is None
    plan = planner.plan(made, SHARDERS)
    assert lines == ["DLRMPlanner"]
    assert list(plan.plan["0"]) == [option.name for option in planner.get_selected_options()]
    assert "callbacks" in planner.report.search
    stock = EmbeddingEnumerator(arguments["topology"], 512, arguments["constraints"]).enumerate(made, SHARDERS)
    assert len(planner.get_search_space()) == len(stock)
    assert planner.hash_planner_context_inputs_str()


def test_a_users_partitioner_proposer_and_model_count() -> None:
    class AllOnOne(Partitioner):
        def partition(self, proposal: list[Any], storage_constraint: Any) -> list[Any]:
            for option in proposal:
                for shard in option.shards:
                    shard.rank = 1
            return proposal

    made, arguments = small(2)
    planner = DLRMPlanner(**arguments, partitioner=AllOnOne())
    plan = planner.plan(made, SHARDERS)
    assert {rank for how in plan.plan["0"].values() for rank in how.ranks} == {1}
    assert "AllOnOne" in planner.report.search
    assert planner.report.bound <= planner.report.rating
    balanced = DLRMPlanner(**arguments, partitioner=MemoryBalancedPartitioner())
    balanced.plan(made, SHARDERS)
    assert "MemoryBalancedPartitioner" in balanced.report.search

    asked = []

    class Watched(UniformProposer):
        def propose(self) -> Any:
            asked.append(1)
            return super().propose()

    proposed = DLRMPlanner(**arguments, proposer=Watched())
    proposed.plan(made, SHARDERS)
    assert asked
    assert proposed.report.search == "forerun"

    where = arguments["topology"]
    modelled = DLRMPlanner(**arguments, performance_model=NoopStorageModel(where))
    modelled.plan(made, SHARDERS)
    stock, _ = stock_rating(made, {**arguments, "performance_model": NoopStorageModel(where)})
    assert modelled.report.rating <= stock
    assert modelled.report.bound is None


def test_a_proposer_that_makes_options_of_its_own_leaves_no_bound() -> None:
    class Cheaper(UniformProposer):
        """torchrec's proposals, each shard at a hundredth of its cost."""

        def propose(self) -> Any:
            proposal = deepcopy(super().propose())
            for option in proposal or ():
                for shard in option.shards:
                    for part in ("fwd_compute", "fwd_comms", "bwd_compute", "bwd_comms"):
                        setattr(shard.perf, part, getattr(shard.perf, part) / 100)
            return proposal

    made, arguments = small(2)
    planner = DLRMPlanner(**arguments, proposer=Cheaper())
    planner.plan(made, SHARDERS)
    assert planner.report.search == "torchrec's search"
    assert (planner.report.bound, planner.report.gap) == (None, None)


def test_a_proposal_like_the_first_is_answered_by_torchrec() -> None:
    class Smallest(UniformProposer):
        """Proposes each table's smallest option, as torchrec's messages want it, and nothing else."""

        answers: ClassVar[list[Any]] = []

        def load(self, search_space: list[Any], enumerator: Any = None) -> None:
            size = {o: sum(s.storage.hbm + s.storage.ddr + s.storage.ssd for s in o.shards) for o in search_space}
            self.proposals = [[min((o for o in size if o.name == t), key=size.get) for t in ("t0", "t1", "t2", "t3")]]

        def propose(self) -> Any:
            return self.proposals.pop() if self.proposals else None

        def feedback(self, partitionable: bool, plan: Any = None, **rest: Any) -> None:
            self.answers.append([option.sharding_type for option in plan])

    made, arguments = small(2)
    DLRMPlanner(**arguments, proposer=Smallest()).plan(made, SHARDERS)
    stock = list(Smallest.answers)
    Smallest.answers.clear()
    EmbeddingShardingPlanner(**arguments, proposer=Smallest()).plan(made, SHARDERS)
    assert stock == Smallest.answers
    assert len(stock) == 1


def test_a_users_proposer_is_asked_within_a_time_limit() -> None:
    asked = []

    class Watched(UniformProposer):
        def propose(self) -> Any:
            asked.append(1)
            return super().propose()

    made, arguments = mlperf(16, min_partition=64)
    DLRMPlanner(**arguments, proposer=Watched(), timeout_seconds=4).plan(made, SHARDERS)
    assert asked


def test_torchrecs_search_runs_where_it_is_asked_for() -> None:
    made, arguments = mlperf(16, min_partition=64)
    proposals = {}
    for asks in (True, False, None):
        planner = DLRMPlanner(**arguments, timeout_seconds=6, asks_torchrec=asks)
        planner.plan(made, SHARDERS)
        proposals[asks] = planner._num_proposals
    assert proposals[True] > 1
    assert proposals[False] == 1


def test_balanced_modules_are_left_to_torchrec() -> None:
    made, arguments = small(2)
    planner = DLRMPlanner(**arguments, partitioner=GreedyPerfPartitioner(balance_modules=True))
    planner.plan(made, SHARDERS)
    stock = EmbeddingShardingPlanner(**arguments, partitioner=GreedyPerfPartitioner(balance_modules=True))
    assert str(planner.plan(made, SHARDERS)) == str(stock.plan(made, SHARDERS))
    assert planner.report.search == "torchrec's search, with GreedyPerfPartitioner"


def test_pooling_factors_may_be_numpys() -> None:
    made, arguments = small(2)
    plain = str(DLRMPlanner(**arguments).plan(made, SHARDERS))
    for constraint in arguments["constraints"].values():
        constraint.pooling_factors = np.array(constraint.pooling_factors)
    assert str(DLRMPlanner(**arguments).plan(made, SHARDERS)) == plain


def test_an_error_that_is_not_torchrecs_stays_what_it_is() -> None:
    class Breaks(EmbeddingStats):
        def log(self, **kwargs: Any) -> None:
            raise KeyError("a user's own")

    made, arguments = mlperf(8)
    arguments.update(topology=topology(8, gigabytes=1, ddr_cap=0), stats=[Breaks()])
    with pytest.raises(KeyError, match="a user's own"):
        DLRMPlanner(**arguments).plan(made, SHARDERS)


def test_options_that_the_time_limit_leaves_out() -> None:
    made, arguments = mlperf(16)
    planner = DLRMPlanner(**arguments, timeout_seconds=30)
    planner._enumerator = Slow(**{k: arguments[k] for k in ("topology", "batch_size", "constraints")})
    planner.plan(made, SHARDERS)
    assert "options that the time limit left out" in planner.report.search
    assert planner.report.bound is None
    left = {option.name for option in planner.get_search_space()}
    assert left == {f"t{i}" for i in range(len(HOTNESS))}
    assert 2 * len(HOTNESS) <= len(planner.get_search_space()) < 600
    planner._enumerator.late = False  # all are listed at the next call
    planner.plan(made, SHARDERS)
    assert planner.report.bound is not None
    planner._enumerator.late, planner._enumerator.later = True, True
    with pytest.raises(PlannerError, match=r"timeout_seconds=30.* is too short for a plan"):
        planner.plan(*other_module())


def other_module() -> tuple[torch.nn.Module, list[Any]]:
    return module([100, 200], dim=16), SHARDERS


class Slow(FastEnumerator):
    """As if listing had taken more than half of the time limit, or all of it."""

    late, later = True, False

    def enumerate(self, module: torch.nn.Module, sharders: list[Any]) -> list[Any]:
        if self.clock is not None and self.clock.limit is not None and self.late:
            self.clock.began -= self.clock.limit * (1.1 if self.later else 0.6)
        return super().enumerate(module, sharders)


def test_a_loaded_plan_is_taken() -> None:
    made, arguments = small(2)
    first = DLRMPlanner(**arguments)
    plan = first.plan(made, SHARDERS)

    class Loader:
        def load(self) -> Any:
            return {option.storage_hash(): option for option in first.get_selected_options()}

        def plan_context_hash(self) -> str:
            return first.hash_planner_context_inputs_str()

        def get_plan_id(self) -> str:
            return "first"

    again = DLRMPlanner(**arguments, plan_loader=Loader())
    assert {n: h.ranks for n, h in again.plan(made, SHARDERS).plan["0"].items()} == {
        n: h.ranks for n, h in plan.plan["0"].items()
    }
    assert again.report.search == "the plan loader"


def test_what_does_not_fit_is_named() -> None:
    made, arguments = mlperf(8)
    arguments["topology"] = topology(8, gigabytes=1, ddr_cap=0)
    with pytest.raises(
        PlannerError, match=r"table '0\.t\d+' lacks \d+ bytes .* of HBM; \d+ bytes .*are enough"
    ) as error:
        DLRMPlanner(**arguments).plan(made, SHARDERS)
    assert error.value.error_type == PlannerErrorType.INSUFFICIENT_STORAGE


def test_mistakes_are_named() -> None:
    made, arguments = small(2)
    wrong = {"t0": ParameterConstraints(pooling_factors=[-1.0])}
    with pytest.raises(PlannerError, match=r"table 't0': pooling_factors has -1\.0"):
        DLRMPlanner(**{**arguments, "constraints": wrong})
    unequal = {"t0": ParameterConstraints(pooling_factors=[1.0, 2.0], num_poolings=[1.0])}
    with pytest.raises(PlannerError, match="must be equal"):
        DLRMPlanner(**{**arguments, "constraints": unequal})
    misspelt = {**arguments["constraints"], "t00": ParameterConstraints(pooling_factors=[2.0])}
    with pytest.warns(UserWarning, match=r"'t00'; did you mean 't0'\?"):
        DLRMPlanner(**{**arguments, "constraints": misspelt}).plan(made, SHARDERS)
    with pytest.raises(PlannerError, match="'t00'"):
        DLRMPlanner(**{**arguments, "constraints": misspelt}, strict=True).plan(made, SHARDERS)
    with pytest.warns(UserWarning, match="no table has pooling factors"):
        DLRMPlanner(**{**arguments, "constraints": None}).plan(made, SHARDERS)
    with pytest.warns(UserWarning, match="no sharder finds a table"):
        assert DLRMPlanner(**arguments).plan(torch.nn.Linear(2, 2), SHARDERS).plan == {}
    twice = torch.nn.ModuleList([module([10, 20], dim=8), module([30], dim=8)])
    with pytest.warns(UserWarning, match="reach 2 tables"):
        DLRMPlanner(**{**arguments, "constraints": pooling([2, 3])}).plan(twice, SHARDERS)


def test_the_time_limit_holds() -> None:
    made, arguments = mlperf(16)
    began = time.monotonic()
    planner = DLRMPlanner(**arguments, timeout_seconds=4)
    planner.plan(made, SHARDERS)
    assert time.monotonic() - began < 5
    assert planner.report.rating <= 8.1164


def test_the_report_is_kept_and_shown(tmp_path: Path) -> None:
    from rich.console import Console

    made, arguments = mlperf(8)
    planner = DLRMPlanner(**arguments)
    planner.plan(made, SHARDERS)
    planner.report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == planner.report
    console = Console(record=True, width=120, file=StringIO())
    console.print(planner.report.explain())
    assert f"rating {planner.report.rating:.4f} ms" in console.export_text()
    planner.report.figure().savefig(tmp_path / "loads.png")
    assert len(planner.report.tables) == len(HOTNESS)
    changed = difference(planner.report, planner.report)
    assert (changed.changed, changed.bytes_moved) == ((), 0)


def ranks(folder: Path, *deed: str) -> list[Any]:
    processes = [
        subprocess.Popen(
            [sys.executable, str(_PROGRAM), str(rank), "2", str(folder / "store"), str(folder / "out"), *deed],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    deadline = time.monotonic() + 240  # most of it imports on a busy machine
    try:
        errors = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    assert [process.returncode for process in processes] == [0, 0], errors
    return [pickle.loads((folder / f"out.{rank}").read_bytes()) for rank in range(2)]


def test_two_ranks_get_one_plan_and_one_report(tmp_path: Path) -> None:
    first, second = ranks(tmp_path)
    assert first == second
    made, arguments = small(2)
    assert first[0] == str(DLRMPlanner(**arguments).plan(made, SHARDERS))


def test_an_error_of_the_rank_that_plans_reaches_all(tmp_path: Path) -> None:
    first, second = ranks(tmp_path, "fail")
    assert first == second
    assert first[0] in ("PlannerError", "RuntimeError")

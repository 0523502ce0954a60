"""The corrected objective: what it adds to torchrec's rating, and that plans are rated and bounded by it."""

from __future__ import annotations

from typing import Any

import pytest
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.types import PlannerError
from torchrec_models import SHARDERS, mlperf, small, topology

from forerun.dlrm.torchrec import DLRMPlanner
from forerun.dlrm.torchrec_enumerator import FastEnumerator
from forerun.dlrm.torchrec_objective import corrected


def costs(options: list[Any], ranks: int, *, ids: bool) -> list[float]:
    sums = [0.0] * ranks
    for option in options:
        for shard in option.shards:
            sums[shard.rank] += shard.perf.total + ids * shard.perf.input_dist_comms
    return sums


def test_ids_on_their_way_count() -> None:
    made, arguments = mlperf(8)
    stock, ours = DLRMPlanner(**arguments), DLRMPlanner(**arguments, objective="corrected")
    stock_plan = stock.plan(made, SHARDERS)
    ours.plan(made, SHARDERS)
    assert (stock.report.objective, ours.report.objective) == ("torchrec", "corrected")
    for planner, ids in ((stock, False), (ours, True)):
        rating = max(costs(planner.get_selected_options(), 8, ids=ids))
        assert planner.report.rating == pytest.approx(rating, rel=1e-12)
        assert max(planner.report.rank_cost) == pytest.approx(rating, rel=1e-12)
    assert ours.report.bound <= ours.report.rating <= ours.report.bound * 1.1
    assert ours.report.rating <= ours.rate(stock_plan).rating * (1 + 1e-9)
    assert stock.rate(stock_plan).rating < ours.rate(stock_plan).rating


@pytest.mark.parametrize("ranks, local", [(4, 4), (2, 2), (4, 2)])
def test_an_all_reduce_within_a_host_is_a_ring_there(ranks: int, local: int) -> None:
    made, arguments = small(ranks)
    where = topology(ranks, local=local)
    listed = [
        EmbeddingEnumerator(t, 512, arguments["constraints"]).enumerate(made, SHARDERS)
        for t in (where, corrected(where))
    ]
    for plain, ring in zip(*listed, strict=True):
        before, after = (option.shards[0].perf for option in (plain, ring))
        if plain.sharding_type != "data_parallel" or ranks > local:
            assert before == after
            continue
        size = plain.tensor.numel() * plain.tensor.element_size()
        stock = size / (where.inter_host_bw * local)
        assert after.bwd_comms - before.bwd_comms == pytest.approx(
            2 * (ranks - 1) / ranks * size / where.intra_host_bw - stock, rel=1e-6
        )
    assert "ring" not in str(where.comms_bandwidths)  # the user's topology is as it was


def test_two_that_say_what_counts_are_refused() -> None:
    _, arguments = small(2)
    where = arguments["topology"]
    for own in ({"performance_model": NoopPerfModel(where)}, {"enumerator": FastEnumerator(where, 8)}):
        with pytest.raises(PlannerError, match=f"objective='corrected' says .* your {next(iter(own))}"):
            DLRMPlanner(**arguments, **own, objective="corrected")
    with pytest.raises(PlannerError, match="objective='better': expected one of torchrec, corrected"):
        DLRMPlanner(**arguments, objective="better")

"""Random models, topologies and memory on the real torchrec: never worse than its planner, never over the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec_models import SHARDERS, pooling, topology

from forerun.dlrm.torchrec import DLRMPlanner

_TABLE = st.tuples(
    st.integers(0, 7).flatmap(lambda power: st.integers(1, 10**power)),  # rows
    st.sampled_from([4, 16, 64, 128]),  # dimension
    st.sampled_from([1.0, 1.0, 2.0, 7.0, 40.0]),  # pooling factor
)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[tuple[int, int, float]], dict[str, Any]]:
    """Tables, and what a planner is made with; from memory in plenty to too little."""
    tables = draw(st.lists(_TABLE, min_size=1, max_size=10))
    ranks, local = draw(st.sampled_from([(1, 1), (2, 2), (4, 4), (4, 2), (8, 8), (8, 4), (16, 8)]))
    weights = 4 * sum(rows * dim for rows, dim, _ in tables)
    share = draw(st.sampled_from([0.6, 1.1, 1.5, 3.0, 10.0]))  # of the weights, on all ranks together
    activations = 2**28
    gigabytes = (share * weights / ranks + activations) / 2**30
    split = draw(st.sampled_from([{}, {}, {"min_partition": 32}]))
    arguments = {
        "topology": topology(ranks, local=local, gigabytes=gigabytes),
        "batch_size": draw(st.sampled_from([64, 512, 4096])),
        "constraints": pooling([factor for *_, factor in tables], **split),
        "storage_reservation": FixedPercentageStorageReservation(0.05),
        "stats": [],
    }
    return tables, arguments


def _module(tables: list[tuple[int, int, float]]) -> torch.nn.Module:
    configs = [
        EmbeddingBagConfig(name=f"t{i}", embedding_dim=dim, num_embeddings=rows, feature_names=[f"f{i}"])
        for i, (rows, dim, _) in enumerate(tables)
    ]
    return torch.nn.Sequential(EmbeddingBagCollection(tables=configs, device=torch.device("meta")))


def _assert_tiles(sharding: Any, rows: int, dim: int) -> None:
    """The shards of a table cover it, each part once."""
    parts = [(*shard.shard_offsets, *shard.shard_sizes) for shard in sharding.sharding_spec.shards]
    tops = sorted({0, rows, *(top for top, *_ in parts), *(top + height for top, _, height, _ in parts)})
    lefts = sorted({0, dim, *(left for _, left, *_ in parts), *(left + width for _, left, _, width in parts)})
    assert (tops[0], tops[-1], lefts[0], lefts[-1]) == (0, rows, 0, dim)
    covered = torch.zeros(len(tops) - 1, len(lefts) - 1)
    for top, left, height, width in parts:
        covered[tops.index(top) : tops.index(top + height), lefts.index(left) : lefts.index(left + width)] += 1
    assert bool((covered == 1).all())


def _check(model: tuple[list[tuple[int, int, float]], dict[str, Any]]) -> None:
    tables, arguments = model
    stock = EmbeddingShardingPlanner(**arguments)
    try:
        stock.plan(_module(tables), SHARDERS)
        theirs = stock._perf_model.rate(stock._best_plan)
    except PlannerError:
        theirs = None
    ours = DLRMPlanner(**arguments)
    try:
        plan = ours.plan(_module(tables), SHARDERS)
    except PlannerError:
        assert theirs is None  # what torchrec can plan, ours can
        return
    report = ours.report
    assert theirs is None or report.rating <= theirs * (1 + 1e-9)
    assert report.bound <= report.rating * (1 + 1e-9)
    options = ours.get_selected_options()
    assert sorted(option.name for option in options) == [f"t{i}" for i in range(len(tables))]
    capacity = [device.storage for device in arguments["topology"].devices]
    used = [[0, 0] for _ in capacity]
    for option in options:
        for shard in option.shards:
            used[shard.rank][0] += shard.storage.hbm
            used[shard.rank][1] += shard.storage.ddr
    assert all(hbm <= own.hbm and ddr <= own.ddr for (hbm, ddr), own in zip(used, capacity, strict=True))
    (module_plan,) = plan.plan.values()
    for index, (rows, dim, _) in enumerate(tables):
        sharding = module_plan[f"t{index}"]
        if sharding.sharding_spec is not None:  # data-parallel: every rank has all of it
            _assert_tiles(sharding, rows, dim)


pytestmark = pytest.mark.filterwarnings("ignore:no table has pooling factors")  # a factor of 1 looks like none
_SETTINGS = {"derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=40, **_SETTINGS)
@given(models())
def test_a_random_model(model: tuple[list[tuple[int, int, float]], dict[str, Any]]) -> None:
    _check(model)


@pytest.mark.soak
@settings(max_examples=400, **_SETTINGS)
@given(models())
def test_many_random_models(model: tuple[list[tuple[int, int, float]], dict[str, Any]]) -> None:
    _check(model)

"""The quick enumerator gives torchrec's options, field by field, and asks torchrec's estimators far less often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchrec
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.types import CustomTopologyData, ShardEstimator
from torchrec.distributed.types import CacheParams
from torchrec_models import HOTNESS, ROWS, SHARDERS, module, pooling, small, topology

from forerun.dlrm.torchrec_enumerator import FastEnumerator


def fields(options: list[Any]) -> list[dict[str, Any]]:
    return [vars(option) for option in options]


def assert_same(made: Any, sharders: list[Any], where: Any, constraints: Any = None, **kwargs: Any) -> None:
    arguments = {"topology": where, "batch_size": 512, "constraints": constraints, **kwargs}
    quick, stock = FastEnumerator(**arguments), EmbeddingEnumerator(**arguments)
    found, expected = quick.enumerate(made, sharders), stock.enumerate(made, sharders)
    assert fields(found) == fields(expected)
    assert fields(quick.last_stored_search_space) == fields(stock.last_stored_search_space)
    for option in found:  # as a planner does
        for shard in option.shards:
            shard.rank = 1
    assert fields(quick.enumerate(made, sharders)) == fields(stock.enumerate(made, sharders))


@pytest.mark.parametrize("ranks", [1, 3, 16])
def test_hotness_and_row_counts_that_do_not_divide(ranks: int) -> None:
    assert_same(module(ROWS), SHARDERS, topology(ranks), pooling(HOTNESS))


def test_column_wise_splits_and_grids() -> None:
    every = ["table_wise", "column_wise", "table_column_wise", "grid_shard", "table_row_wise", "row_wise"]
    assert_same(
        module([1000, 77, 30]), SHARDERS, topology(16), pooling([1, 5, 9], min_partition=32, sharding_types=every)
    )


def test_kernels_caches_and_several_features() -> None:
    constraints = {
        "t0": ParameterConstraints(compute_kernels=["fused_uvm_caching"], cache_params=CacheParams(load_factor=0.1)),
        "t1": ParameterConstraints(compute_kernels=["key_value"], sharding_types=["column_wise", "row_wise"]),
        "t2": ParameterConstraints(pooling_factors=[2.0, 0.5], num_poolings=[1.0, 2.0], batch_sizes=[64, 128]),
        "t3": ParameterConstraints(is_weighted=True, enforce_hbm=True),
    }
    sharders = [EmbeddingBagCollectionSharder(fused_params={"cache_load_factor": 0.3, "prefetch_pipeline": True})]
    assert_same(module([1000, 5000, 31, 8]), sharders, topology(4), constraints)


def test_optimizers_weighted_bags_cpu_and_unlike_ranks() -> None:
    made = torchrec.EmbeddingBagCollection(
        tables=module([301, 40], dim=16)[0].embedding_bag_configs(), is_weighted=True, device=torch.device("cpu")
    )
    _apply_optimizer_in_backward(torch.optim.Adam, made.parameters(), {"lr": 0.1})
    assert_same(made, SHARDERS, topology(2, device="cpu"))
    unlike = CustomTopologyData({"hbm_cap": [1 << 30, 2 << 30, 3 << 30, 4 << 30]}, world_size=4)
    assert_same(made, SHARDERS, topology(4, custom_topology_data=unlike))


def test_sequence_embeddings() -> None:
    tables = [EmbeddingConfig(name="s", embedding_dim=8, num_embeddings=100, feature_names=["f"])]
    made = torch.nn.ModuleDict({"a": EmbeddingCollection(tables=tables), "b": module([50], dim=8)})
    assert_same(made, [EmbeddingCollectionSharder(), *SHARDERS], topology(4))


def test_torchrec_is_asked_once_for_each_size_and_a_users_estimator_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, int] = {}

    def count(kind: str, original: Any) -> Any:
        def estimate(self: Any, sharding_options: list[Any], sharder_data_map: Any) -> None:
            asked[kind] = sum(len(option.shards) for option in sharding_options)
            original(self, sharding_options, sharder_data_map=sharder_data_map)

        return estimate

    class Doubling(ShardEstimator):
        def __init__(self, topology: Any = None, constraints: Any = None) -> None:
            pass

        def estimate(self, sharding_options: list[Any], sharder_data_map: Any) -> None:
            asked["user"] = sum(len(option.shards) for option in sharding_options)
            for option in sharding_options:
                for shard in option.shards:
                    shard.perf.fwd_compute *= 2  # in place: shards must not share their estimates

    for estimator in (EmbeddingPerfEstimator, EmbeddingStorageEstimator):
        monkeypatch.setattr(estimator, "estimate", count(estimator.__name__, estimator.estimate))
    where = topology(16)
    mine = [EmbeddingPerfEstimator(where), Doubling(), EmbeddingStorageEstimator(where)]
    made = module([1000, 77])
    options = FastEnumerator(topology=where, batch_size=8, estimator=mine).enumerate(made, SHARDERS)
    every = sum(len(option.shards) for option in options)
    assert asked["user"] == every
    assert asked["EmbeddingPerfEstimator"] == asked["EmbeddingStorageEstimator"] < every / 3
    expected = EmbeddingEnumerator(topology=where, batch_size=8, estimator=mine).enumerate(made, SHARDERS)
    assert fields(options) == fields(expected)


def test_an_estimator_that_fails_leaves_the_shards() -> None:
    class Broken(EmbeddingStorageEstimator):
        def estimate(self, sharding_options: list[Any], sharder_data_map: Any) -> None:
            raise RuntimeError("broken")

    made, arguments = small()
    where = arguments["topology"]
    with pytest.raises(RuntimeError, match="broken"):
        FastEnumerator(topology=where, batch_size=8, estimator=[Broken(where)]).enumerate(made, SHARDERS)

"""Contracts with torchrec: every symbol that forerun stands on exists and takes what it is given."""

from __future__ import annotations

import inspect
import os
from dataclasses import fields
from importlib import metadata

import pytest
import torch

pytest.importorskip("torchrec")  # the oldest diffusers' environment has none

from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.estimator import annotations
from torchrec.distributed.planner.estimator import estimator as perf_estimators
from torchrec.distributed.planner.estimator.types import HardwarePerfConfig
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.planners import EmbeddingShardingPlanner
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerErrorType, Shard, Topology

from forerun_adapters import torchrec as host


def test_this_is_the_release_that_was_asked_for() -> None:
    asked = os.environ.get("FORERUN_TORCHREC", "1.8")  # `make test-torchrec` sets it
    assert metadata.version("torchrec").startswith(f"{asked}.")


def test_the_planner_asks_its_proposers_and_partitioner_by_these_names() -> None:
    source = inspect.getsource(EmbeddingShardingPlanner.plan)
    for used in ("self._proposers", "self._partitioner.partition(", "proposal=proposal", "storage_constraint="):
        assert used in source
    # The search happens in partition(): the planner's own time limit is looked at before it, not after.
    assert source.index("proposer.load(") < source.index("start = time.time()") < source.index("self._timeout_seconds:")
    assert "self._best_plan = best_plan" in source


def test_the_enumerator_estimates_all_options_and_then_copies_them() -> None:
    source = inspect.getsource(EmbeddingEnumerator.enumerate)
    estimates = source.index("self.populate_estimates(sharding_options)")
    assert estimates < source.index("self._last_stored_search_space = copy.deepcopy(sharding_options)")
    assert source.count("_last_stored_module == module") == source.count("_last_stored_sharders == sharders") == 1
    estimate = inspect.signature(EmbeddingStorageEstimator.estimate).parameters
    assert list(estimate) == ["self", "sharding_options", "sharder_data_map"]
    assert source.count("in self._filter_sharding_types(") == 1  # for every table: where the time limit is looked at


def test_estimates_are_of_a_shard_alone() -> None:
    where = Topology(world_size=2, compute_device="cpu")
    assert host.estimated(EmbeddingStorageEstimator(where)) == "storage"
    assert host.estimated(EmbeddingPerfEstimator(where)) == "perf"
    assert host.estimated(EmbeddingPerfEstimator(where)._estimator) == "perf"

    class Uneven(HardwarePerfConfig):
        def post_process_perfs(self, shard_perfs, *args, **kwargs):
            return shard_perfs

    class Own(EmbeddingStorageEstimator):
        pass

    assert host.estimated(perf_estimators.EmbeddingPerfEstimator(where, config=Uneven())) is None
    assert host.estimated(Own(where)) is None
    assert host.estimated(object()) is None


def test_a_quick_estimator_leaves_the_original() -> None:
    stock = EmbeddingPerfEstimator(Topology(world_size=2, compute_device="cpu"))
    inner, config = stock._estimator, stock._estimator._config
    kind = type(config)
    quick = host.quick(stock)
    assert (stock._estimator, stock._estimator._config, type(config)) == (inner, config, kind)
    assert isinstance(quick._estimator._config, HardwarePerfConfig)
    assert vars(quick._estimator._config) is vars(config)
    assert len(dir(quick._estimator._config)) < len(dir(config))
    unknown = object()
    assert host.quick(unknown) is unknown


def test_marked_methods_stay_listed() -> None:
    class Marked(HardwarePerfConfig):
        @annotations.forward_compute
        def mine(self, ctx):
            return 7.0

    stock = perf_estimators.EmbeddingPerfEstimator(Topology(world_size=2, compute_device="cpu"), config=Marked())
    assert annotations.get_forward_compute(host.quick(stock)._config, "table_wise")(None) == 7.0


def test_shards_errors_and_hosts() -> None:
    assert {"size", "offset", "storage", "perf", "rank"} == {field.name for field in fields(Shard)}
    assert host.planner_error("INSUFFICIENT_STORAGE", "x").error_type is PlannerErrorType.INSUFFICIENT_STORAGE
    assert host.planner_error("NO_SUCH_TYPE", "x").error_type is PlannerErrorType.OTHER
    assert host.host_of(Topology(world_size=4, local_world_size=2, compute_device="cpu")) == [0, 0, 1, 1]
    pods = Topology(world_size=8, local_world_size=2, pod_size=2, compute_device="cpu")
    assert host.host_of(pods) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert host.is_greedy(GreedyPerfPartitioner())
    assert not host.is_greedy(GreedyPerfPartitioner(balance_modules=True))
    assert host.default_sharders()


def test_that_nothing_fits_is_told_from_other_errors() -> None:
    assert host.no_plan(host.planner_error("INSUFFICIENT_STORAGE", "x")) == "INSUFFICIENT_STORAGE"
    with pytest.raises(AttributeError) as unworded:
        _ = Own()._percentage
    assert host.no_plan(unworded.value) == "INSUFFICIENT_STORAGE"
    assert host.no_plan(AttributeError("another")) is None
    assert host.no_plan(KeyError("x")) is None


class Own(FixedPercentageStorageReservation):
    """A reservation without a percentage."""

    def __init__(self) -> None:
        pass


def test_a_placeholder_is_like_no_other_option() -> None:
    tables = EmbeddingBagCollection(
        tables=[EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=10, feature_names=["f"])],
        device=torch.device("meta"),
    )
    where = Topology(world_size=2, compute_device="cpu")
    sharders = [EmbeddingBagCollectionSharder()]
    option = EmbeddingEnumerator(where, batch_size=8).enumerate(torch.nn.Sequential(tables), sharders)[0]
    placeholder = host.unlike_any(option)
    assert hash(placeholder) not in (hash(option), hash(host.unlike_any(option)))
    assert vars(placeholder) == vars(option)
    assert isinstance(placeholder, type(option))

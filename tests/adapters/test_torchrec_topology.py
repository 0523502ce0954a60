"""Contracts with torchrec's topology: its arguments, its units, and how its estimators ask for bandwidths."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("torchrec")  # the oldest diffusers' environment has none

from torchrec.distributed.planner.estimator import estimator
from torchrec.distributed.planner.types import CollectiveType, CustomTopologyData, GeneralizedCommsBandwidth, Topology

from forerun_adapters import torchrec_topology as host


def test_a_topology_takes_every_constant() -> None:
    takes = inspect.signature(Topology).parameters
    assert {*host.CONSTANTS, "generalized_comms_bandwidths", "custom_topology_data", "created_by_factory"} <= set(takes)
    made = host.topology(world_size=2, compute_device="cpu", per_rank={"ddr_cap": [1, 2]}, ddr_mem_bw=3.0)
    assert [device.storage.ddr for device in made.devices] == [1, 2]
    assert made.ddr_mem_bw == 3.0
    with pytest.raises(TypeError, match="takes no 'speed'"):
        host.topology(world_size=2, compute_device="cpu", speed=1)
    assert {"hbm_cap", "ddr_cap", "ssd_cap"} == set(CustomTopologyData.supported_fields)


def test_bandwidths_are_asked_for_by_these_names() -> None:
    asked = inspect.signature(GeneralizedCommsBandwidth.get_bw).parameters
    assert list(asked) == ["self", "local_world_size", "world_size", "collective_type"]
    names = {collective.value for collective in CollectiveType}
    assert names == {"all_to_all", "all_reduce", "reduce_scatter", "all_gather"}


def test_an_all_reduce_is_multiplied_as_torchrec_does() -> None:
    source = inspect.getsource(estimator.DataParallelEvaluator)
    for used in (
        "min(ctx.world_size / ctx.local_world_size, 2)",
        "table_size * (2 * num_nodes - 1) / num_nodes / comms_bw",
        "if ctx.world_size > 2 * ctx.local_world_size:\n            all_reduce *= 2",
    ):
        assert used in source
    assert [host.all_reduce_factor(*ranks) for ranks in ((8, 8), (16, 8), (24, 8))] == [1.0, 1.5, 3.0]

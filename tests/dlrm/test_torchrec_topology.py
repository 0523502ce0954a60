"""A topology from a calibration: torchrec's own estimates are then what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.constants import CROSS_NODE_BANDWIDTH, INTRA_NODE_BANDWIDTH
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec_models import SHARDERS, module, pooling

from forerun.dlrm.calibration import COLLECTIVES, Calibration, Line, Scope, Timing
from forerun.dlrm.torchrec import DLRMPlanner
from forerun.dlrm.torchrec_topology import topology_from

_SPEED = {"all_to_all": 1e6, "all_reduce": 5e5, "reduce_scatter": 2.5e5, "all_gather": 2e5}  # bytes per ms
_LARGEST = 4 * 1024**2


def line(operation: str, scope: Scope, speed: float, latency: float = 0.0) -> Line:
    timings = tuple(Timing(size, latency + size / speed) for size in (65536, 1024**2, _LARGEST))
    return Line(operation, scope, 2, latency, speed, timings)


def calibration(world: int = 4, local: int = 2, latency: float = 0.0) -> Calibration:
    """As if every collective took twice as long between hosts."""
    lines = [line("lookup", "rank", 4e6)]
    if local > 1:
        lines += [line(name, "intra_host", _SPEED[name], latency) for name in COLLECTIVES]
    if world > local:
        lines += [line(name, "inter_host", _SPEED[name] / 2, latency) for name in COLLECTIVES]
    return Calibration("2026-01-01", "cpu", "gloo", world, local, 1, "a machine", {}, tuple(lines))


def perfs(topology: Topology, batch: int = 64, dim: int = 32) -> dict[str, Any]:
    """torchrec's estimates of a table, by sharding type."""
    where = torch.nn.Sequential(module([1000], dim=dim))
    found = EmbeddingEnumerator(topology, batch, pooling([3])).enumerate(where, SHARDERS)
    return {option.sharding_type: option.shards[0].perf for option in found}


@pytest.mark.parametrize("ranks, local, share", [(2, 2, 1.0), (4, 2, 0.5), (6, 2, 0.5)])
def test_estimates_are_the_measured_times(ranks: int, local: int, share: float) -> None:
    made = calibration()
    batch, dim = 64, 32
    found = perfs(topology_from(made, ranks, local_world_size=local, ddr_mem_bw=1e30), batch, dim)
    outputs = batch * ranks * dim * 4
    assert found["table_wise"].fwd_comms == pytest.approx(outputs / (_SPEED["all_to_all"] * share))
    assert found["table_wise"].bwd_comms == pytest.approx(outputs / (_SPEED["all_to_all"] * share))
    # All of the gradient, once, whatever torchrec multiplies it by.
    assert found["data_parallel"].bwd_comms == pytest.approx(1000 * dim * 4 / (_SPEED["all_reduce"] * share))


def test_lookups_are_priced_by_the_measured_memory() -> None:
    """With 128 columns torchrec's forward estimate is bytes over bandwidth, as the lookup was measured."""
    batch, dim, ranks = 64, 128, 2
    found = perfs(topology_from(calibration(), ranks, local_world_size=2), batch, dim)
    size = batch * ranks * (3 * (8 + dim * 4) + dim * 4)
    assert found["table_wise"].fwd_compute == pytest.approx(size / 4e6)


def test_a_bandwidth_is_taken_at_a_message() -> None:
    made = calibration(2, 2, latency=3.0)
    assert topology_from(made, 2).intra_host_bw == pytest.approx(_LARGEST / (3 + _LARGEST / 1e6))
    assert topology_from(made, 2, message=65536).intra_host_bw == pytest.approx(65536 / (3 + 65536 / 1e6))
    assert topology_from(made, 2, message=65536).ddr_mem_bw == pytest.approx(4e6)


def test_units_are_torchrecs(tmp_path: Path) -> None:
    """600 GiB/s and 12.5 GiB/s of torchrec's own topology, measured, give its own constants."""
    half_a_second = {"intra_host": 300 * 1024**3, "inter_host": int(6.25 * 1024**3)}  # bytes
    scopes: tuple[Scope, ...] = ("intra_host", "inter_host")
    lines = [Line("all_to_all", it, 2, 0.0, 1.0, (Timing(half_a_second[it], 500.0),)) for it in scopes]
    made = replace(calibration(), lines=tuple(lines))
    made.save(tmp_path / "calibration.json")
    topology = topology_from(tmp_path / "calibration.json", 4, local_world_size=2)
    assert topology.intra_host_bw == pytest.approx(INTRA_NODE_BANDWIDTH)
    assert topology.inter_host_bw == pytest.approx(CROSS_NODE_BANDWIDTH)


def test_memory_and_given_constants() -> None:
    made = calibration(2, 2)
    topology = topology_from(made, 4, local_world_size=2, inter_host_bw=7.0, ddr_mem_bw=9.0, ddr_cap=11)
    assert (topology.inter_host_bw, topology.ddr_mem_bw) == (7.0, 9.0)
    assert [device.storage.ddr for device in topology.devices] == [11] * 4
    uneven = topology_from(made, 2, per_rank={"ddr_cap": [5, 6]})
    assert [device.storage.ddr for device in uneven.devices] == [5, 6]


def test_what_the_calibration_cannot_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"inter_host was not measured: .*torchrun on several hosts.*inter_host_bw"):
        topology_from(calibration(2, 2), 4, local_world_size=2)
    with pytest.raises(ValueError, match="intra_host was not measured"):
        topology_from(calibration(2, 1), 4, local_world_size=2)
    with pytest.raises(ValueError, match="is of cpu, the topology of cuda"):
        topology_from(calibration(), 2, compute_device="cuda")
    with pytest.raises(ValueError, match="message=0"):
        topology_from(calibration(), 2, message=0)
    with pytest.raises(TypeError, match="takes no 'hbm_gb'"):
        topology_from(calibration(), 2, hbm_gb=80)
    with pytest.raises(FileNotFoundError):
        topology_from(tmp_path / "none.json", 2)
    with pytest.warns(UserWarning, match="2 ranks a host, the topology has 4"):
        topology_from(calibration(), 4)


def test_plans_are_made_on_it() -> None:
    for ranks, made in ((1, calibration(1, 1)), (2, calibration()), (4, calibration())):
        topology = topology_from(made, ranks, local_world_size=min(2, ranks))
        planner = DLRMPlanner(
            topology=topology,
            batch_size=64,
            constraints=pooling([3, 1]),
            storage_reservation=FixedPercentageStorageReservation(0.05),
            stats=[],
        )
        planner.plan(module([1000, 20], dim=32, device="cpu"), SHARDERS)
        assert 0 < planner.report.bound <= planner.report.rating * (1 + 1e-9)


def test_a_real_calibration_prices_a_real_all_to_all(calibrated: tuple[Path, str]) -> None:
    """Two gloo processes were measured; torchrec's estimate of a message of a measured size is the measured time."""
    out, _ = calibrated
    measured = Calibration.load(out).line("all_to_all", "intra_host")
    assert measured is not None
    dim = 32
    for timing in measured.timings:
        batch = timing.bytes // (2 * dim * 4)
        found = perfs(topology_from(out, 2, message=timing.bytes), batch, dim)
        assert found["table_wise"].fwd_comms == pytest.approx(timing.ms)

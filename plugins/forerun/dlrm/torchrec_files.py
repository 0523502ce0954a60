"""Plans from files alone: tables of a CSV file, ranks of a JSON file, nothing allocated."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from forerun.dlrm.report import Report
from forerun.dlrm.tables_file import TableRow, read_tables
from forerun.dlrm.topology_file import TopologyFile, read_topology
from forerun.dlrm.torchrec import DLRMPlanner
from forerun.dlrm.torchrec_objective import Objective
from forerun.dlrm.torchrec_topology import topology_from
from forerun_adapters import torchrec as host
from forerun_adapters import torchrec_data as data
from forerun_adapters import torchrec_model as models
from forerun_adapters import torchrec_topology as topologies

__all__ = ["FilePlanning", "NoPlan"]


class NoPlan(Exception):
    """A planner found none; the message says what is missing."""


class FilePlanning:
    """What two files describe, and plans for it.

    Args:
        tables: A CSV file; see `forerun.dlrm.tables_file.TableRow`.
        topology: A JSON file; see `forerun.dlrm.topology_file.TopologyFile`.
        batch_size: Samples of a rank; None: torchrec's default.
        timeout: Seconds that a planner may take; None: until it is done.
        objective: What plans are rated by; see `DLRMPlanner`.

    Raises:
        ValueError: A file says something that cannot be; the message names it.
        OSError: A file cannot be read.
    """

    def __init__(
        self,
        tables: Path,
        topology: Path,
        *,
        batch_size: int | None = None,
        timeout: float | None = None,
        objective: Objective = "torchrec",
    ) -> None:
        rows = read_tables(tables, sharding_types=models.SHARDING_TYPES, compute_kernels=models.COMPUTE_KERNELS)
        ranks = read_topology(topology, constants=topologies.CONSTANTS)
        self._module = _module(rows)
        self._arguments: dict[str, Any] = {
            "topology": _topology(topology, ranks),
            "batch_size": batch_size,
            "constraints": {row.name: _constraints(row) for row in rows},
            "storage_reservation": models.reserved(ranks.reserved_percent / 100),
            "timeout_seconds": timeout,
            "stats": [],
        }
        self.planner = DLRMPlanner(**self._arguments, objective=objective)

    def plan(self) -> Report:
        """`DLRMPlanner`'s plan.

        Raises:
            NoPlan: There is none, or none was found.
        """
        with _no_plan():
            self.planner.plan(self._module, host.default_sharders())
        assert self.planner.report is not None
        return self.planner.report

    def peer(self) -> tuple[Report, float]:
        """torchrec's own planner's plan, rated alike, and the seconds it took; after `plan`.

        Raises:
            NoPlan: It found none.
        """
        planner = host.EmbeddingShardingPlanner(**self._arguments)
        began = time.monotonic()
        with _no_plan():
            plan = planner.plan(self._module, host.default_sharders())
        return self.planner.rate(plan), time.monotonic() - began


@contextmanager
def _no_plan() -> Iterator[None]:
    try:
        yield
    except (host.PlannerError, RuntimeError) as error:
        # Without the log that torchrec then refers to: a line for each way in which each table cannot be sharded.
        raise NoPlan(str(error).strip().partition("\n")[0].partition(" To debug")[0]) from error


def _module(rows: Sequence[TableRow]) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, weighted in (("bags", False), ("weighted_bags", True)):
        configs = [
            models.bag(row.name, row.rows, row.dim, row.features, row.data_type, row.pooling)
            for row in rows
            if row.weighted == weighted
        ]
        if configs:
            module.add_module(name, models.bags(configs, weighted=weighted))
    return module


def _constraints(row: TableRow) -> Any:
    made = data.ParameterConstraints(min_partition=row.min_partition, is_weighted=row.weighted)
    for name, values in (
        ("pooling_factors", row.pooling_factor),
        ("num_poolings", row.num_poolings),
        ("batch_sizes", row.batch_size),
        ("sharding_types", row.sharding_types),
        ("compute_kernels", row.compute_kernels),
    ):
        if values:
            setattr(made, name, list(values))
    if not row.pooling_factor and (row.num_poolings or row.batch_size):  # torchrec wants them equally many
        made.pooling_factors = made.pooling_factors * len(row.features)
    return made


def _topology(path: Path, ranks: TopologyFile) -> Any:
    memory = {"hbm_cap": ranks.of_ranks("hbm_gb"), "ddr_cap": ranks.of_ranks("ddr_gb")}
    per_rank = {name: each for name, each in memory.items() if each is not None}
    given = dict(ranks.constants or {})
    if ranks.calibration is None:
        return topologies.topology(
            per_rank=per_rank,
            world_size=ranks.world_size,
            local_world_size=ranks.local_world_size,
            compute_device=ranks.compute_device,
            **given,
        )
    try:
        return topology_from(
            ranks.calibration,
            ranks.world_size,
            local_world_size=ranks.local_world_size,
            compute_device=ranks.compute_device,
            message=ranks.message_bytes,
            per_rank=per_rank,
            **given,
        )
    except ValueError as error:
        raise ValueError(f"{path}, key calibration: {error}") from error

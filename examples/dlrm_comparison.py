"""One DLRM trained on the ranks of a process group by torchrec's plan and by forerun's, step by step in turns.

`train_dlrm.py` starts this on every rank. Both models begin with the same weights and see the same batches, so their
losses are the same but for rounding; what differs is where the work is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from click_logs import Batch, ClickLog, Share
from dlrm_model import Optimizer, Trained, build, sharded
from dlrm_run import Run, opened
from dlrm_traffic import watched
from movielens import fetch
from numpy.typing import NDArray
from rich.progress import track
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

from forerun.dlrm.torchrec import DLRMPlanner

__all__ = ["OURS", "STOCK", "Measured", "Outcome", "Planned", "trained"]

STOCK, OURS = "torchrec", "forerun"
_SHARDERS = [EmbeddingBagCollectionSharder()]
_WATCHED = 3  # steps whose collectives are counted; they are not timed, for the profiler takes time itself

Floats = NDArray[np.float32]


class Planned(NamedTuple):
    """One planner's plan, the same on all ranks."""

    planner: str
    plan: Any  # torchrec's ShardingPlan
    seconds: float  # of collective_plan()
    rating: float | None  # ms, on rank 0


@dataclass
class Measured:
    """Of one planner's model on one rank."""

    losses: list[float] = field(default_factory=list)  # of each step
    seconds: list[float] = field(default_factory=list)  # of each timed step, waiting for other ranks included
    busy: list[float] = field(default_factory=list)  # of the processor, in each timed step
    sent: int = 0  # bytes to other ranks in a step
    in_collectives: float = 0.0  # share of a step in which a collective was under way
    scores: list[Floats] = field(default_factory=list)  # of what is held out


class Outcome(NamedTuple):
    """Of all ranks."""

    planned: list[Planned]
    measured: list[list[Measured]]  # by rank, then by plan
    seen: list[Floats]  # labels that each rank trained on
    held_out: list[Floats]  # labels of what each rank scored


def trained(run: Run) -> tuple[ClickLog, Outcome | None]:
    """Trains by both plans on all ranks of the default group; what came out, on rank 0.

    Raises:
        ValueError: The log is malformed, or none that is known.
    """
    share = Share(dist.get_rank(), dist.get_world_size())
    if share.rank == 0 and run.data == "movielens":
        fetch(run.cache)
    dist.barrier()  # the others find it there
    log = opened(run)
    planned, models = _planned(run, log, share)
    measured = [Measured() for _ in models]
    batches = log.training(share, run.batch)
    seen = _train(run, list(zip(models, measured, strict=True)), batches, share)
    counted = [next(batches) for _ in range(_WATCHED)]
    for model, of_it in zip(models, measured, strict=True):
        _watch(model, of_it, counted, share)
    labels = []
    for batch in log.held_out(share, run.batch):
        labels.append(batch.labels)
        for model, of_it in zip(models, measured, strict=True):
            of_it.scores.append(model.logits(batch).numpy())
    everything: list[Any] | None = [None] * share.ranks if share.rank == 0 else None
    dist.gather_object((measured, seen, np.concatenate([np.empty(0, np.float32), *labels])), everything)
    if everything is None:
        return log, None
    by_rank, all_seen, all_labels = map(list, zip(*everything, strict=True))
    return log, Outcome(planned, by_rank, all_seen, all_labels)


def _planned(run: Run, log: ClickLog, share: Share) -> tuple[list[Planned], list[Trained]]:
    """The same model by both plans."""
    narrow = {} if run.min_partition is None else {"min_partition": run.min_partition}
    arguments: dict[str, Any] = {
        "topology": Topology(share.ranks, "cpu", local_world_size=share.ranks),
        "batch_size": run.batch,
        "constraints": {
            table.name: ParameterConstraints(pooling_factors=[table.pooling], **narrow) for table in log.tables
        },
        "storage_reservation": FixedPercentageStorageReservation(0.05),
        "stats": [],
    }
    ours = DLRMPlanner(**arguments)  # the only line that is new
    plans, models = [], []
    for name, planner in ((STOCK, EmbeddingShardingPlanner(**arguments)), (OURS, ours)):
        model = build(log.tables, log.columns, run.dim, run.width)
        began = time.perf_counter()
        plan = planner.collective_plan(model, _SHARDERS, dist.group.WORLD)
        plans.append((name, plan, time.perf_counter() - began))
        models.append(sharded(model, plan, _SHARDERS, Optimizer()))
    rated = share.rank == 0  # which planned
    return [Planned(*each, ours.rate(each[1]).rating if rated else None) for each in plans], models


def _train(
    run: Run, sides: Sequence[tuple[Trained, Measured]], batches: Iterator[Batch], share: Share
) -> NDArray[np.float32]:
    """Trains; the labels seen."""
    seen = []
    numbers = range(run.warm_up + run.steps)
    for number in track(numbers, description=f"training on {share.ranks} ranks", disable=share.rank != 0):
        batch = next(batches)
        seen.append(batch.labels)
        for model, measured in sides if number % 2 else reversed(sides):
            dist.barrier()  # all begin together
            began, began_busy = time.perf_counter(), time.process_time()
            measured.losses.append(float(model.step(batch)))
            if number >= run.warm_up:
                measured.seconds.append(time.perf_counter() - began)
                measured.busy.append(time.process_time() - began_busy)
    return np.concatenate(seen)


def _watch(model: Trained, measured: Measured, batches: Sequence[Batch], share: Share) -> None:
    """Goes on training, and counts what this rank sends to others."""
    dist.barrier()
    with watched(*share) as traffic:
        began = time.perf_counter()
        for batch in batches:
            model.step(batch)
        seconds = time.perf_counter() - began
    measured.sent = traffic.sent // len(batches)
    measured.in_collectives = traffic.seconds / seconds

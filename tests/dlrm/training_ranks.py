"""What the training test starts: two steps by every kind of sharding on 2 and on 4 ranks, against the unsharded model.

python training_ranks.py FOLDER

Writes what each rank found, `FOLDER/RANKS.RANK.json`: for each case what the tables were sharded as, and how far loss,
scores and weights are from the unsharded model's. All ranks are forked from one process that has torchrec imported.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from click_logs import Batch, Share, SyntheticLog, Table
from dlrm_model import Optimizer, Trained, build, fill, pieces, sharded
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

from forerun.dlrm.synthetic import PowerLaw
from forerun.dlrm.torchrec import DLRMPlanner

# Dimension 16 in columns of 8: a column-wise table has two shards. Rows that the ranks do not divide, and a table with
# fewer rows than a batch has lookups, so that rows repeat.
TABLES = (Table("a", 40, 1.0), Table("b", 7, 3.0), Table("c", 1001, 2.0), Table("d", 50, 5.0))
COLUMNS, DIM, WIDTH, SIZE = 4, 16, 32, 8
LOCAL = 2  # ranks of a host
EVERY = ("data_parallel", "table_wise", "column_wise", "table_column_wise", "row_wise", "table_row_wise", "grid_shard")
OPTIMIZERS = {
    "sgd": Optimizer(torch.optim.SGD, (("lr", 10.0),)),
    # With a smaller eps a gradient of next to nothing moves a weight by all of lr, and rounding decides where to.
    "adagrad": Optimizer(torch.optim.Adagrad, (("lr", 0.1), ("eps", 1e-4))),
}
# What each table is constrained to.
CASES: dict[str, tuple[str | None, ...]] = {
    **{each: (each,) * len(TABLES) for each in EVERY},
    "mixed": ("data_parallel", "column_wise", "row_wise", "table_wise"),
    "free": (None,) * len(TABLES),
}
RUNS = [*((case, "sgd") for case in CASES), ("mixed", "adagrad"), ("free", "adagrad")]


class EverySharder(EmbeddingBagCollectionSharder):
    """Offers on a CPU what torchrec's offers on a GPU only."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(EVERY)


class Expected(NamedTuple):
    """The unsharded model's, on the batch of all ranks."""

    losses: list[float]  # before the first step and before the second
    scores: torch.Tensor  # after both
    weights: dict[str, torch.Tensor]
    moved: float  # the least that the steps changed a weight's largest element by


def batches(ranks: int) -> list[list[Batch]]:
    """Two batches of every rank."""
    log = SyntheticLog(TABLES, COLUMNS, lambda table: PowerLaw(table.rows, 0.5))
    streams = [log.training(Share(rank, ranks), SIZE) for rank in range(ranks)]
    return [[next(stream) for stream in streams] for _ in range(2)]


def joined(parts: list[Batch]) -> Batch:
    """All ranks' shares as one batch."""
    return Batch(
        dense=np.concatenate([part.dense for part in parts]),
        ids=np.concatenate([each for table in zip(*map(_by_table, parts), strict=True) for each in table]),
        lengths=np.concatenate([part.lengths for part in parts], axis=1),
        labels=np.concatenate([part.labels for part in parts]),
    )


def _by_table(part: Batch) -> list[np.ndarray]:
    return np.split(part.ids, np.cumsum(part.lengths.sum(1))[:-1])


def expected(given: list[list[Batch]], optimizer: Optimizer) -> Expected:
    """Two steps of the unsharded model."""
    model = build(TABLES, COLUMNS, DIM, WIDTH, device="cpu")
    fill(model, seed=0)
    alone = Trained(model, optimizer.kind(model.parameters(), **dict(optimizer.settings)))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    losses = [float(alone.step(joined(parts))) for parts in given]
    after = {name: weight.detach() for name, weight in model.state_dict().items()}
    moved = min(float((after[name] - before[name]).abs().max()) for name in after)
    return Expected(losses, alone.logits(joined(given[0])), after, moved)


def planner(ranks: int, types: tuple[str | None, ...]) -> DLRMPlanner:
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=kind and [kind], pooling_factors=[table.pooling], min_partition=8
        )
        for table, kind in zip(TABLES, types, strict=True)
    }
    return DLRMPlanner(
        topology=Topology(ranks, "cpu", local_world_size=LOCAL),
        batch_size=SIZE,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(0.05),
        stats=[],
    )


def tried(rank: int, ranks: int, case: str, name: str, answers: tuple[list[list[Batch]], Expected]) -> dict[str, Any]:
    """Two steps by one plan; the largest distances of this rank's results from the unsharded model's."""
    given, wanted = answers
    model = build(TABLES, COLUMNS, DIM, WIDTH)
    plan = planner(ranks, CASES[case]).collective_plan(model, [EverySharder()], dist.group.WORLD)
    trained = sharded(model, plan, [EverySharder()], OPTIMIZERS[name])
    losses = []
    for parts in given:
        loss = trained.step(parts[rank])
        dist.all_reduce(loss)
        losses.append(float(loss) / ranks)
    scores = trained.logits(given[0][rank])
    held = list(pieces(trained.model))
    return {
        "case": case,
        "optimizer": name,
        "types": {table: how.sharding_type for table, how in plan.plan["sparse_arch.embedding_bag_collection"].items()},
        "loss": max(abs(ours - theirs) for ours, theirs in zip(losses, wanted.losses, strict=True)),
        "scores": float((scores - wanted.scores[rank * SIZE : (rank + 1) * SIZE]).abs().max()),
        "weights": max(float((it.part - _same_part(it, wanted.weights)).abs().max()) for it in held if it.part.numel()),
        "moved": wanted.moved,
        "elements": {name: sum(it.part.numel() for it in held if it.name == name) for name in wanted.weights},
    }


def _same_part(piece: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = weights[piece.name][piece.row : piece.row + piece.part.shape[0]]
    return rows if rows.ndim == 1 else rows[:, piece.column : piece.column + piece.part.shape[1]]


def work(rank: int, ranks: int, folder: Path) -> None:
    """All cases on one rank."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(LOCAL)  # torchrec's sharded modules read it
    store = f"file://{folder}/store{ranks}"
    dist.init_process_group("gloo", store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    given = batches(ranks)
    wanted = {name: expected(given, optimizer) for name, optimizer in OPTIMIZERS.items()}
    results = [tried(rank, ranks, case, name, (given, wanted[name])) for case, name in RUNS]
    (folder / f"{ranks}.{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    for ranks in (2, 4):
        torch.multiprocessing.start_processes(work, (ranks, Path(sys.argv[1])), nprocs=ranks, start_method="fork")

"""Plan MLPerf's DLRMv2 with torchrec's planner and with DLRMPlanner, and compare: rating, bound, gap, seconds.

    python examples/plan_dlrm.py --out build/dlrm

Its 26 tables are only described (meta device), so this needs neither their memory nor a GPU. Prints a table; with
`--out` writes it as `dlrm.json`, and a picture of what each rank is given.

Source: mlcommons/training, recommendation_v2/torchrec_dlrm (table sizes, multi-hot sizes, dimension, batch).
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import CustomTopologyData

from forerun.dlrm.report import Report
from forerun.dlrm.torchrec import DLRMPlanner

ROWS = [40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4, 976]
ROWS += [14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36]
HOTNESS = [3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1]  # lookups per sample
DIM, BATCH = 128, 65536  # the batch of all ranks together
STOCK, OURS = "torchrec", "forerun"
SHARDERS = [EmbeddingBagCollectionSharder()]


@dataclass(frozen=True)
class Outcome:
    """What one planner made of one number of ranks."""

    ranks: int
    planner: str
    seconds: float  # of the whole plan()
    bound: float  # no plan's rating is lower (ms)
    report: Report

    @property
    def rating(self) -> float:
        """The largest sum of estimated costs of a rank (ms)."""
        return self.report.rating

    @property
    def gap(self) -> float:
        """By what share of the bound the rating may be above the best possible one."""
        return max(0.0, self.rating / self.bound - 1)


def tables(rows: Iterable[int], dim: int) -> torch.nn.Module:
    """An embedding bag for each number of rows, without memory."""
    configs = [
        EmbeddingBagConfig(name=f"t{i}", embedding_dim=dim, num_embeddings=n, feature_names=[f"f{i}"])
        for i, n in enumerate(rows)
    ]
    return torch.nn.Sequential(EmbeddingBagCollection(tables=configs, device=torch.device("meta")))


def planner_arguments(
    ranks: int, hotness: Sequence[float], local: int = 8, memory: Sequence[int] = (80,), **constraints: Any
) -> dict[str, Any]:
    """What both planners are given: GPUs, `local` of them on a host, the lookups per sample of each table.

    Args:
        ranks: GPUs.
        hotness: Lookups per sample.
        local: GPUs of a host.
        memory: GB of the GPUs, over again from the first where there are more of them.
        constraints: Further ones, of every table.
    """
    each = [memory[rank % len(memory)] * 1024**3 for rank in range(ranks)]
    unequal = {"custom_topology_data": CustomTopologyData({"hbm_cap": each}, ranks)} if len(set(each)) > 1 else {}
    return {
        "topology": Topology(ranks, "cuda", hbm_cap=each[0], local_world_size=min(local, ranks), **unequal),
        "batch_size": BATCH // ranks,
        "constraints": {
            f"t{i}": ParameterConstraints(pooling_factors=[float(h)], **constraints) for i, h in enumerate(hotness)
        },
        "storage_reservation": FixedPercentageStorageReservation(0.05),
        "stats": [],
    }


def compare(ranks: int) -> list[Outcome]:
    """Plans MLPerf's tables with torchrec's planner, then with DLRMPlanner."""
    module = tables(ROWS, DIM)
    stock = EmbeddingShardingPlanner(**planner_arguments(ranks, HOTNESS))
    began = time.perf_counter()
    plan = stock.plan(module, SHARDERS)
    stock_seconds = time.perf_counter() - began
    ours = DLRMPlanner(**planner_arguments(ranks, HOTNESS))  # the only line that is new
    began = time.perf_counter()
    ours.plan(module, SHARDERS)
    seconds = time.perf_counter() - began
    assert ours.report is not None
    assert ours.report.bound is not None
    return [
        Outcome(ranks, STOCK, stock_seconds, ours.report.bound, ours.rate(plan)),
        Outcome(ranks, OURS, seconds, ours.report.bound, ours.report),
    ]


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Each rank's load: a column per number of ranks, a row per planner."""
    columns = sorted({outcome.ranks for outcome in outcomes})
    figure = Figure(figsize=(3.4 * len(columns), 5.2), layout="constrained")
    grid = figure.subplots(2, len(columns), sharey="col", squeeze=False)
    for outcome in outcomes:
        axes = grid[(STOCK, OURS).index(outcome.planner)][columns.index(outcome.ranks)]
        load = outcome.report.rank_cost
        axes.bar(range(outcome.ranks), load, width=1.0, color="C7" if outcome.planner == STOCK else "C0")
        axes.axhline(outcome.rating, color="C3", linewidth=1, label="rating: the largest")
        axes.axhline(outcome.bound, color="black", linewidth=1, linestyle="--", label="no plan is below")
        axes.set_title(f"{outcome.planner}, {outcome.ranks} ranks: {outcome.rating:.4f} ms", fontsize=10)
        axes.set_xlabel("rank")
    grid[0][0].legend(fontsize=8, loc="lower right")
    for row in grid:
        row[0].set_ylabel("estimated cost (ms)")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64, 128])
    parser.add_argument("--out", type=Path, help="folder for dlrm.json and the picture")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # torchrec's, one for each table that is copied to every rank
    outcomes: list[Outcome] = []
    print(f"{'ranks':>5}  {'planner':<9} {'rating':>9} {'bound':>9} {'gap':>7} {'seconds':>8}")
    for ranks in options.ranks:
        for it in compare(ranks):
            print(
                f"{it.ranks:>5}  {it.planner:<9} {it.rating:>9.4f} {it.bound:>9.4f} {it.gap:>7.2%} {it.seconds:>8.2f}",
                flush=True,
            )
            outcomes.append(it)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        told = ("ranks", "planner", "rating", "bound", "gap", "seconds")
        rows = [{name: getattr(it, name) for name in told} for it in outcomes]
        (options.out / "dlrm.json").write_text(json.dumps(rows, indent=2) + "\n")
        draw(outcomes, options.out / "loads.png")


if __name__ == "__main__":
    main()

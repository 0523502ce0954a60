"""What the traffic test starts: known collectives on two ranks, counted.

python traffic_ranks.py FOLDER
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from dlrm_traffic import watched


def work(rank: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    told = {}
    with watched(rank, 2) as traffic:  # rank 0 sends 4 of its 6 rows of 3, rank 1 sends 5 of its 6
        rows = [2, 4] if rank == 0 else [5, 1]
        dist.all_to_all_single(torch.empty(7 if rank == 0 else 5, 3), torch.ones(6, 3), [[2, 5], [4, 1]][rank], rows)
    told["all to all"] = traffic.sent
    with watched(rank, 2) as traffic:
        dist.all_to_all_single(torch.empty(8), torch.ones(8))
    told["even all to all"] = traffic.sent
    with watched(rank, 2) as traffic:
        dist.all_reduce(torch.ones(100, dtype=torch.int64))
    told["all-reduce"] = traffic.sent
    with watched(rank, 2) as traffic:
        dist.all_gather_into_tensor(torch.empty(2, 10), torch.ones(1, 10))
    told["all-gather"] = traffic.sent
    with watched(rank, 2) as traffic:
        torch.ones(3) @ torch.ones(3)
    told["nothing"] = traffic.sent, traffic.seconds
    with watched(rank, 2) as traffic:
        dist.barrier()
        if rank == 1:
            time.sleep(1)
        dist.all_reduce(torch.ones(1))
    told["seconds"] = traffic.seconds
    try:
        with watched(rank, 2):
            dist.broadcast(torch.ones(1), 0)
    except ValueError as error:
        told["refused"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, (Path(sys.argv[1]),), nprocs=2, start_method="fork")

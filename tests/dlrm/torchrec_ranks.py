"""What the process-group test starts on every rank: one plan for all, by the rank that plans.

python torchrec_ranks.py RANK SIZE STORE OUT [fail]
"""

from __future__ import annotations

import gc
import pickle
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec_models import SHARDERS, pooling, small

from forerun.dlrm.torchrec import DLRMPlanner


def main() -> None:
    rank, size, store, out, *deed = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{store}", rank=int(rank), world_size=int(size), timeout=timedelta(seconds=60)
    )
    module, arguments = small(int(size))
    if deed == ["fail"]:
        arguments["constraints"] = pooling([1, 1, 1, 1], sharding_types=["row_wise"], compute_kernels=["fused_uvm"])
    planner = DLRMPlanner(**arguments)
    try:
        plan = planner.collective_plan(module, SHARDERS, dist.group.WORLD)
        answer = (str(plan), planner.report)
    except Exception as error:
        answer = (type(error).__name__, str(error))
    Path(f"{out}.{rank}").write_bytes(pickle.dumps(answer))
    dist.barrier()
    gc.collect()  # an error's frames hold the group
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

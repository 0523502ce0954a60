"""Two ranks time experts and count batches, each its own tokens; what they tell is the same, and of all tokens.

Usage: imbalance_program.py STORE RANK
"""

import datetime
import sys

import torch
import torch.distributed as dist

from forerun.moe.imbalance import ExpertTimes, Ledger, measure


def main(store, rank):
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    try:
        matrix = torch.randn(64, 64)
        print(measure(lambda rows: [torch.randn(rows, 64) @ matrix for _ in range(8)], 8))
        ledger = Ledger(ExpertTimes((1, 2), (2.0, 3.0), (2.0, 3.0)), torch.tensor([[0, 2, 1, 3]]), 2, batches=2)
        mine = torch.tensor([[3, 0, 0, 0], [0, 0, 3, 0]][rank : rank + 1])  # together on one rank by the plan
        for _ in range(2):
            ledger.saw(mine, 3, 1.0)
            print(ledger.worth(), ledger.state())
        assert ledger.state() == {"batches": 2, "saved": 2.0, "cost": 2 * (8.0 - 4.0)}
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""One rank of a mixture of experts over gloo: both ways back against the plain computation on this rank alone.

    python exchange_program.py RANK RANKS STORE

Prints a line a case; the exit status is 0 if all agree.
"""

import datetime
import os
import signal
import sys

import torch
import torch.distributed as dist

from forerun.moe.dispatch import rows as counted
from forerun.moe.exchange import dispatch, return_pairs, return_sums

EXPERTS, TOP_K, WIDTH = 8, 3, 16


def weights(dtype):
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator) / 4).to(dtype)


def tokens_of(case, rank, ranks):
    """Unequal numbers, none on a rank, none at all."""
    return {"even": 12, "uneven": 5 + 7 * rank, "none here": 9 * (rank != 1), "none": 0, "to one rank": 10}[case]


def run(case, rank, ranks, dtype):
    generator = torch.Generator().manual_seed(100 * rank + len(case))
    count = tokens_of(case, rank, ranks)
    hidden = torch.randn(count, WIDTH, generator=generator).to(dtype)
    scores = torch.rand(count, EXPERTS, generator=generator)
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(3))  # the expert at each place
    where = torch.empty_like(order)
    where[order] = torch.arange(EXPERTS)
    if case == "to one rank":
        scores[:, order[: EXPERTS // ranks]] += 2
    top, chosen = scores.topk(TOP_K, dim=1)
    place, pair = where[chosen].flatten().sort(stable=True)
    arrived = dispatch(hidden, pair // TOP_K, place, EXPERTS)
    # The experts that lie here, each over its pairs in the order of their arrival.
    each = EXPERTS // ranks
    expert = torch.arange(each).repeat(ranks).repeat_interleave(arrived.pairs.flatten())
    given = arrived.rows[arrived.row]
    computed, matrices = torch.empty_like(given), weights(dtype)
    for local in range(each):
        mine = expert == local
        computed[mine] = row_by_row(given[mine], matrices[order[rank * each + local]])
    slots = torch.empty(count * TOP_K, WIDTH, dtype=dtype)
    slots[pair] = return_pairs(arrived, computed)
    exact = (slots.view(count, TOP_K, WIDTH) * top[..., None]).sum(1).to(dtype)
    sums = return_sums(arrived, computed, top.flatten()[pair])
    plain = torch.stack([row_by_row(hidden, matrix) for matrix in matrices], 1)  # [n, E, H]
    plain = plain.gather(1, chosen[..., None].expand(-1, -1, WIDTH))
    expected = (plain * top[..., None]).sum(1).to(dtype)
    assert torch.equal(exact, expected), f"{case}: pairs differ"
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    size = (plain.float().abs() * top[..., None]).sum(1)
    assert bool(((sums.float() - expected.float()).abs() <= tolerance * size + 1e-9).all()), f"{case}: sums differ"
    held = where // each
    sent = counted(chosen.numpy(), held.numpy(), torch.full((count,), rank).numpy(), ranks)
    assert arrived.leaving(rank) == sent.leaving(), f"{case}: rows"
    assert sum(arrived.sent_rows) == int(sent.deduplicated.sum())
    if case == "to one rank":
        assert arrived.leaving(rank) <= count * (1 + (ranks > 2))
    return arrived.leaving(rank), sent.leaving(deduplicated=False)


def row_by_row(rows, matrix):
    """A product whose rows do not depend on each other's number: bitwise the same in any batch."""
    return (rows[:, :, None].float() * matrix.float()).sum(1).to(rows.dtype)


if __name__ == "__main__":
    rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60)
    )
    for dtype in (torch.float32, torch.bfloat16):
        for case in ("even", "uneven", "none here", "none", "to one rank"):
            print(rank, dtype, case, *run(case, rank, ranks, dtype), flush=True)
    if len(sys.argv) > 4 and rank == ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)  # in the middle
    if len(sys.argv) > 4:
        run("even", rank, ranks, torch.float32)
    dist.barrier()
    dist.destroy_process_group()

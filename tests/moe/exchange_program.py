"""One rank of a mixture of experts over gloo: every way back against the plain computation on this rank alone;
and the two halves of an all-reduce.

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
from forerun.moe.exchange import dispatch, return_pairs
from forerun.moe.foresight import even
from forerun.moe.overlap import Pace, summed
from forerun.moe.pieces import PIECE_BYTES, Pieces
from forerun.moe.scatter import chunk, gather, scatter_sum
from forerun.moe.shuffle import assign, shuffle

EXPERTS, TOP_K, WIDTH = 8, 3, 16


def weights(dtype):
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator) / 4).to(dtype)


def tokens_of(case, rank, ranks):
    """Unequal numbers, none on a rank, none at all."""
    return {"even": 12, "uneven": 5 + 7 * rank, "none here": 9 * (rank != 1), "none": 0, "to one rank": 10}[case]


class Always(Pace):
    """Local experts are computed while rows travel, whatever that is worth."""

    def overlaps(self, pairs):
        return True


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

    def compute(rows, counts):
        parts = rows.split(counts.tolist())
        return torch.cat([row_by_row(part, matrices[order[rank * each + at]]) for at, part in enumerate(parts)])

    paced = {
        name: summed(hidden, pair // TOP_K, place, top.flatten()[pair], EXPERTS, compute, pace=pace)
        for name, pace in (("together", Pace()), ("overlapped", Always()))
    }
    returned = sum(arrived.got_rows) - arrived.got_rows[rank]
    plain = torch.stack([row_by_row(hidden, matrix) for matrix in matrices], 1)  # [n, E, H]
    plain = plain.gather(1, chosen[..., None].expand(-1, -1, WIDTH))
    expected = (plain * top[..., None]).sum(1).to(dtype)
    assert torch.equal(exact, expected), f"{case}: pairs differ"
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    size = (plain.float().abs() * top[..., None]).sum(1)
    for name, (sums, leaving, answered) in paced.items():
        off = (sums.float() - expected.float()).abs()
        assert bool((off <= tolerance * size + 1e-9).all()), f"{case}, {name}: sums differ"
        assert (leaving, answered) == (arrived.leaving(rank), returned)
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


def scattered(tokens, rank, ranks, dtype):
    """The two halves of an all-reduce: each token's sum on its rank, and all tokens back in order, bit for bit."""
    parts = [torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(at)).to(dtype) for at in range(ranks)]
    to = torch.rand(tokens, ranks, generator=torch.Generator().manual_seed(tokens))
    for there in (
        even(tokens, ranks),
        shuffle(assign(to), ranks),
        shuffle(torch.zeros(tokens, dtype=torch.long), ranks),
    ):
        mine = scatter_sum(parts[rank], there)
        total = sum(part.float() for part in parts).to(dtype)
        assert torch.equal(mine, chunk(total, there, rank))
        assert torch.equal(gather(mine, there), total)
        pieces = Pieces(slow=True)
        wide = [part.repeat(1, PIECE_BYTES // (4 * WIDTH)) for part in parts]  # some rows a piece
        mine = scatter_sum(wide[rank], there, pieces=pieces)
        assert torch.equal(gather(mine, there, pieces=pieces), total.repeat(1, PIECE_BYTES // (4 * WIDTH)))
        reduced = parts[rank].clone()
        dist.all_reduce(reduced)
        if ranks <= 2:
            assert torch.equal(reduced, total)
        size = sum(part.float().abs() for part in parts)
        steps = {torch.float32: 2**-23, torch.bfloat16: 2**-7}[dtype] * ranks  # an all-reduce rounds at each
        assert bool(((reduced.float() - total.float()).abs() <= steps * size).all())


if __name__ == "__main__":
    rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60)
    )
    for dtype in (torch.float32, torch.bfloat16):
        for case in ("even", "uneven", "none here", "none", "to one rank"):
            print(rank, dtype, case, *run(case, rank, ranks, dtype), flush=True)
        for tokens in (0, 1, 2, 5, 12):
            scattered(tokens, rank, ranks, dtype)
    if len(sys.argv) > 4 and rank == ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)  # in the middle
    if len(sys.argv) > 4:
        run("even", rank, ranks, torch.float32)
    dist.barrier()
    dist.destroy_process_group()

"""Spread one layer's batches over gloo ranks, all sizes, both ways back: every token's answer and the bytes.

Usage: spread_program.py STORE RANK RANKS
"""

import datetime
import sys

import torch
import torch.distributed as dist

from forerun.moe.choice import Choice
from forerun.moe.foresight import Foresight
from forerun.moe.pieces import Pieces
from forerun.moe.sglang_spread import Ranks, Spread

EXPERTS, TOP_K, WIDTH = 8, 2, 16


def main(store, rank, ranks):
    dist.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60)
    )
    torch.manual_seed(0)
    matrix = torch.randn(EXPERTS, WIDTH, WIDTH)
    place = torch.randperm(EXPERTS)
    lies = place.argsort()  # the expert at each place
    each = EXPERTS // ranks

    def compute(rows, number):
        return (rows[:, :, None] * matrix[lies[number + rank * each]]).sum(1)

    for exact in (False, True):
        for apart in (False, True):
            shared = Ranks(None, rank, ranks, exact, apart, Foresight(None, range(ranks)), Pieces())
            spread = Spread(shared, 0, EXPERTS, place, Choice(None, 0.0))
            for count in (0, 1, 2, 5, 33):
                check(spread, count + rank if apart else count, matrix, compute)
    dist.destroy_process_group()


def check(spread, count, matrix, compute):
    shared = spread.ranks
    draw = torch.Generator().manual_seed(count + 100 * shared.rank * shared.apart)
    part, residual = torch.randn(2, count, WIDTH, generator=draw)
    everywhere = torch.tensor([count])
    if shared.apart:
        dist.all_reduce(everywhere)
    before = spread.counted.bytes
    spread.chosen = True
    if not spread.begin(count, int(everywhere), WIDTH * 4):
        assert int(everywhere) == 0
        return
    mine, kept = spread.scatter(part, residual)
    expert = torch.stack([torch.randperm(EXPERTS, generator=draw)[:TOP_K] for _ in range(count)] or [torch.empty(0)])
    expert = expert.long().view(count, TOP_K)
    weight = torch.rand(count, TOP_K, generator=draw)
    expert[:: max(count // 3, 1), 0] = -1  # as padding has it
    at = slice(0, count)
    if not shared.apart:
        sizes = [count // shared.size + (rank < count % shared.size) for rank in range(shared.size)]
        at = slice(sum(sizes[: shared.rank]), sum(sizes[: shared.rank + 1]))
        assert torch.allclose(mine, shared.size * part[at], atol=1e-5)  # every rank has the same part here
    output = spread.answer(mine, weight[at], expert[at], compute)
    whole = part if shared.apart else shared.size * part
    plain = (whole[:, None, :, None] * matrix[expert.clamp(min=0)]).sum(2)
    plain = (plain * weight[..., None] * (expert >= 0)[..., None]).sum(1)
    assert torch.allclose(output, plain[at], atol=1e-4), (count, shared.exact, shared.apart)
    if not shared.apart:
        assert torch.allclose(spread.gather(output, kept), plain + residual, atol=1e-4)
    spread.end()
    assert spread.counted.bytes - before >= 8 * (shared.size - 1)
    assert not spread.under_way


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

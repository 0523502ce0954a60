"""Spread one layer's batches over gloo ranks, all sizes, both ways back: every token's answer, rows and bytes exact.

Usage: spread_program.py STORE RANK RANKS
"""

import datetime
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from forerun.moe.choice import Choice
from forerun.moe.foresight import Foresight
from forerun.moe.pieces import Pieces
from forerun.moe.sglang_spread import Ranks, Spread

EXPERTS, TOP_K, WIDTH = 8, 2, 16
ROW = 4 * WIDTH  # bytes


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
                check(spread, count, matrix, compute)
                count_experts(spread, count)
    dist.destroy_process_group()


def check(spread, count, matrix, compute):
    shared = spread.ranks
    batches = [drawn(count + rank * shared.apart, rank * shared.apart) for rank in range(shared.size)]
    part, residual, expert, weight = batches[shared.rank]
    count = len(part)
    everywhere = sum(len(batch[0]) for batch in batches) if shared.apart else count
    before = replace(spread.counted)
    spread.chosen = True
    if not spread.begin(count, everywhere, ROW):
        assert everywhere == 0
        return
    mine, kept = spread.scatter(part, residual)
    at = slice(0, count)
    sizes = [count // shared.size + (rank < count % shared.size) for rank in range(shared.size)]
    if not shared.apart:
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
    rows, moved = sent(spread, [batch[2] for batch in batches] if shared.apart else expert.split(sizes))
    if not shared.apart:
        moved += (count - len(mine)) * ROW  # half of the sum
        moved += (shared.size - 1) * max(sizes) * ROW  # all tokens again
    counted = spread.counted
    assert counted.tokens - before.tokens == everywhere
    assert (counted.rows - before.rows, counted.bytes - before.bytes) == (rows, moved), (count, shared)
    assert not spread.under_way


def count_experts(spread, count):
    """Over all ranks each pair of a batch is counted once, either way, padding never."""
    shared = spread.ranks
    batches = [drawn(count + rank * shared.apart, rank * shared.apart) for rank in range(shared.size)]
    tokens = [len(batch[0]) for batch in batches] if shared.apart else [count]
    if not sum(tokens):
        return
    every = [batch[2] for batch in batches[: len(tokens)]]
    expected = torch.bincount(torch.cat(every)[torch.cat(every) >= 0], minlength=EXPERTS)
    padding = torch.arange(TOP_K).expand(max(tokens), TOP_K)  # asks, as SGLang's does
    filled = [torch.cat((own, padding[len(own) :])) for own in every]
    shared.each, shared.counting = tokens if shared.apart else (), True
    for seen in (torch.cat(every), torch.cat(filled)):
        spread.asked = None
        spread.saw(seen)
        assert total(spread.asked).equal(expected)
    if shared.apart:
        own, rows = filled[shared.rank], spread.counted.rows
        answer = spread.answer(torch.ones(len(own), WIDTH), torch.ones(own.shape), own, lambda rows, number: rows)
        assert total(spread.asked).equal(expected)
        assert not answer[len(every[shared.rank]) :].any()
        assert spread.counted.rows - rows == sent(spread, every)[0]  # nothing is sent for what is no token
    shared.each, shared.counting = (), False


def total(asked):
    told = torch.zeros(EXPERTS, dtype=torch.long) if asked is None else asked.clone()
    dist.all_reduce(told)
    return told


def drawn(count, seed):
    """A batch: `[n, H]` its part, `[n, H]` its residual, `[n, k]` its experts, below 0 for none, and their weights."""
    draw = torch.Generator().manual_seed(count + 100 * seed)
    part, residual = torch.randn(2, count, WIDTH, generator=draw)
    expert = torch.stack([torch.randperm(EXPERTS, generator=draw)[:TOP_K] for _ in range(count)] or [torch.empty(0)])
    expert = expert.long().view(count, TOP_K)
    weight = torch.rand(count, TOP_K, generator=draw)
    expert[:: max(count // 3, 1), 0] = -1  # as padding has it
    return part, residual, expert, weight


def sent(spread, experts):
    """Rows and bytes that this rank sends to experts elsewhere, and back to tokens elsewhere.

    Args:
        experts: `[n, k]` of each rank's tokens.
    """
    me, each = spread.ranks.rank, EXPERTS // spread.ranks.size
    pairs, rows = torch.zeros(2, spread.ranks.size, spread.ranks.size, dtype=torch.long)  # of each rank's at each rank
    for rank, chosen in enumerate(experts):
        for token in chosen:
            at = torch.bincount(spread.place[token[token >= 0]] // each, minlength=spread.ranks.size)
            pairs[rank] += at
            rows[rank] += at > 0
    leaving = int(rows[me].sum() - rows[me, me])
    back = pairs if spread.ranks.exact else rows
    answered = int(back[:, me].sum() - back[me, me])
    use = each if spread.ranks.exact else 4 * each  # bytes that say what a row is for, up to a multiple of 8
    return leaving, 8 * (spread.ranks.size - 1) + leaving * (ROW + -(-use // 8) * 8) + answered * ROW


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

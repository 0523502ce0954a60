"""An all-reduce in two halves, tokens shuffled in between: what tensor parallelism does around its experts.

Each rank of a tensor-parallel group holds a part of every token's attention output. Instead of adding them up on all
ranks, each token is added up on the one rank that it is sent to (`scatter_sum`), its experts are asked from there, and
the results come together on all ranks in the tokens' own order (`gather`). Both halves send what the all-reduce sends.

`scatter_sum` adds in the order of the ranks. An all-reduce adds in an order that depends on the place in the buffer: on
two ranks both are the same bit for bit, on more they differ by the order of additions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from forerun.moe.exchange import Group
from forerun.moe.pieces import Begin, End, Pieces
from forerun.moe.shuffle import Shuffle

__all__ = ["chunk", "gather", "scatter_sum"]


def chunk(rows: Tensor, shuffle: Shuffle, rank: int) -> Tensor:
    """`[sizes[rank], …]` the rows of one rank's tokens, in their shuffled order."""
    start = sum(shuffle.sizes[:rank])
    return rows.index_select(0, shuffle.order[start : start + shuffle.sizes[rank]])


def scatter_sum(part: Tensor, shuffle: Shuffle, group: Group = None, pieces: Pieces | None = None) -> Tensor:
    """`[sizes[rank], H]` the sums of this rank's tokens, added in float32 and rounded once.

    Plain equivalent: `chunk(all_reduce(part), shuffle, rank)`.

    Args:
        part: `[n, H]` this rank's part of every token.
        shuffle: The same on all ranks.
        group: Of the sum; None: all ranks.
        pieces: In which it goes, of tensors on the CPU; None: all at once.
    """
    ranks, rank, sizes = dist.get_world_size(group), dist.get_rank(group), shuffle.sizes
    total = torch.zeros(sizes[rank], part.shape[1], dtype=torch.float32, device=part.device)
    starts = [sum(sizes[:one]) for one in range(ranks)]

    def begin(rows: slice) -> End:
        each = [range(size)[rows] for size in sizes]  # of each rank's tokens
        taken = [shuffle.order[start + one.start : start + one.stop] for start, one in zip(starts, each, strict=True)]
        sent, counts, mine = part.index_select(0, torch.cat(taken)), [len(one) for one in each], len(each[rank])
        got = part.new_empty(ranks * mine, part.shape[1])
        handle = dist.all_to_all_single(got, sent, [mine] * ranks, counts, group=group, async_op=True)

        def end() -> None:
            handle.wait()
            for one in got.view(ranks, mine, part.shape[1]):
                total[rows] += one

        return end

    _hand_over(pieces, max(sizes), ranks, part, begin)
    return total.to(part.dtype)


def gather(rows: Tensor, shuffle: Shuffle, group: Group = None, pieces: Pieces | None = None) -> Tensor:
    """`[n, H]` all tokens in their own order, on all ranks.

    Args:
        rows: `[sizes[rank], H]` this rank's tokens, in their shuffled order.
        shuffle: The same on all ranks.
        group: Of the gathering; None: all ranks.
        pieces: In which it goes, of tensors on the CPU; None: all at once.
    """
    most = max(shuffle.sizes)
    padded = rows
    if len(rows) < most:
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
    padded = padded.contiguous()
    every = rows.new_empty(len(shuffle.sizes), most, *rows.shape[1:])

    def begin(at: slice) -> End:
        handle = dist.all_gather([one[at] for one in every], padded[at], group=group, async_op=True)
        return lambda: handle.wait()

    _hand_over(pieces, most, len(every), padded, begin)
    kept = [torch.arange(size) + rank * most for rank, size in enumerate(shuffle.sizes)]
    return every.flatten(0, 1).index_select(0, torch.cat(kept).to(rows.device)[shuffle.inverse])


def _hand_over(pieces: Pieces | None, rows: int, ranks: int, like: Tensor, begin: Begin) -> None:
    if pieces is None or like.device.type != "cpu":
        begin(slice(0, rows))()
    else:
        pieces.hand_over(rows, (ranks - 1) * like.shape[1] * like.element_size(), begin)

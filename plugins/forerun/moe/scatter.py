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

from forerun.moe.exchange import Group, exchanged
from forerun.moe.shuffle import Shuffle

__all__ = ["chunk", "gather", "scatter_sum"]


def chunk(rows: Tensor, shuffle: Shuffle, rank: int) -> Tensor:
    """`[sizes[rank], …]` the rows of one rank's tokens, in their shuffled order."""
    start = sum(shuffle.sizes[:rank])
    return rows.index_select(0, shuffle.order[start : start + shuffle.sizes[rank]])


def scatter_sum(part: Tensor, shuffle: Shuffle, group: Group = None) -> Tensor:
    """`[sizes[rank], H]` the sums of this rank's tokens, added in float32 and rounded once.

    Plain equivalent: `chunk(all_reduce(part), shuffle, rank)`.

    Args:
        part: `[n, H]` this rank's part of every token.
        shuffle: The same on all ranks.
        group: Of the sum; None: all ranks.
    """
    ranks, mine = dist.get_world_size(group), shuffle.sizes[dist.get_rank(group)]
    parts = exchanged(part.index_select(0, shuffle.order), list(shuffle.sizes), [mine] * ranks, group)
    total = torch.zeros(mine, part.shape[1], dtype=torch.float32, device=part.device)
    for one in parts.view(ranks, mine, part.shape[1]):
        total += one
    return total.to(part.dtype)


def gather(rows: Tensor, shuffle: Shuffle, group: Group = None) -> Tensor:
    """`[n, H]` all tokens in their own order, on all ranks.

    Args:
        rows: `[sizes[rank], H]` this rank's tokens, in their shuffled order.
        shuffle: The same on all ranks.
        group: Of the gathering; None: all ranks.
    """
    most = max(shuffle.sizes)
    padded = rows
    if len(rows) < most:
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
    every = rows.new_empty(len(shuffle.sizes), most, *rows.shape[1:])
    dist.all_gather(list(every), padded.contiguous(), group=group)
    kept = [torch.arange(size) + rank * most for rank, size in enumerate(shuffle.sizes)]
    return every.flatten(0, 1).index_select(0, torch.cat(kept).to(rows.device)[shuffle.inverse])

"""Experts from rank to rank, in place, in memory that their size does not add to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["MOVE_BYTES", "move"]

MOVE_BYTES = 32 << 20  # bytes of a rank's two buffers, sending and receiving, while experts move

Group = dist.ProcessGroup | None


@torch.no_grad()
def move(
    weights: Sequence[Sequence[Tensor]], before: Tensor, after: Tensor, group: Group = None, most: int = MOVE_BYTES
) -> int:
    """Moves experts to other places; all ranks of the group call it alike.

    Every weight goes in pieces, so that both buffers together hold at most `most` bytes, or a byte per expert if that
    is more. Where a rank is lost in between, weights are left in part here, in part there.

    Args:
        weights: Of each weight of an expert, the tensors at this rank's E/R places: contiguous, alike on all ranks.
        before: `[E]` the expert at each place; rank r holds the places from r E/R on.
        after: `[E]` the same afterwards.
        group: Of the ranks; None: all.
        most: Bytes of both buffers.

    Returns:
        Bytes that left this rank.

    Raises:
        RuntimeError: A rank is lost, or did not take part in the group's time.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    each = len(before) // ranks
    source = before.argsort()[after].tolist()  # the place each place's expert comes from
    changed = [place for place, origin in enumerate(source) if place != origin]
    if not changed:
        return 0
    # Each pair of ranks exchanges experts in the order of the places that they go to.
    sends = [
        [source[p] % each for p in changed if p // each == to and source[p] // each == rank] for to in range(ranks)
    ]
    takes = [[p % each for p in changed if p // each == rank and source[p] // each == by] for by in range(ranks)]
    sending, taking = [p for part in sends for p in part], [p for part in takes for p in part]
    left = 0
    for places in weights:
        flat = [tensor.view(-1).view(torch.uint8) for tensor in places]
        piece = max(1, most // (2 * each))
        for start in range(0, flat[0].numel(), piece):
            parts = [tensor[start : start + piece] for tensor in flat]
            width = parts[0].numel()
            sent = parts[0].new_empty((len(sending), width))
            for row, place in zip(sent, sending, strict=True):
                row.copy_(parts[place])
            received = sent.new_empty((len(taking), width))
            assert sent.numel() + received.numel() <= max(most, 2 * each)
            dist.all_to_all_single(received, sent, [len(p) for p in takes], [len(p) for p in sends], group=group)
            for row, place in zip(received, taking, strict=True):
                parts[place].copy_(row)
            left += (len(sending) - len(sends[rank])) * width
    return left

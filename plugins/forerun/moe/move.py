"""Experts from rank to rank, in place, in memory that their size does not add to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["MOVE_BYTES", "Route", "move", "pieces", "toward"]

MOVE_BYTES = 32 << 20  # bytes of a rank's two buffers, sending and receiving, while experts move

Group = dist.ProcessGroup | None


@torch.no_grad()
def move(
    weights: Sequence[Sequence[Tensor]], before: Tensor, after: Tensor, group: Group = None, most: int = MOVE_BYTES
) -> int:
    """Moves experts to other places; all ranks of the group call it alike.

    Every weight goes in pieces, so that both buffers together hold at most `most` bytes, or two bytes per expert if
    that is more. Where a rank is lost in between, weights are left in part here, in part there.

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
    route = Route.between(before, after, dist.get_rank(group), dist.get_world_size(group))
    left = 0
    for parts in pieces(weights, route, most):
        route.put(parts, route.exchange(parts, group)[0])
        left += route.leaving * parts[0].numel()
    return left


def pieces(weights: Sequence[Sequence[Tensor]], route: Route, most: int = MOVE_BYTES) -> Iterator[list[Tensor]]:
    """The bytes of each weight of the experts here, piece by piece: those of one exchange; the arguments are `move`'s.

    As many pieces on all ranks; none where no expert moves.
    """
    if not route.widest:
        return
    width = max(1, most // (2 * route.widest))
    for places in weights:
        flat = [tensor.view(-1).view(torch.uint8) for tensor in places]
        for start in range(0, flat[0].numel(), width):
            yield [tensor[start : start + width] for tensor in flat]


def toward(before: Tensor, after: Tensor, ranks: int, most: int) -> Tensor:
    """An order on the way from one order to another, that each rank takes no more than so many experts for.

    Every place takes the expert it shall have from the place that has it, that one from a third, and so on; where a
    rank has taken enough, the last of the row keeps what the first one had, which goes on from there another time.

    Args:
        before: `[E]` the expert at each place.
        after: `[E]` the same in the end.
        ranks: R, that hold E/R places each.
        most: Experts that a rank takes, 2 or more: each call comes nearer to the end.
    """
    assert most >= 2
    has, shall, each = before.tolist(), after.tolist(), len(before) // ranks
    at = {expert: place for place, expert in enumerate(has)}
    room, taken, order = [most] * ranks, set[int](), list(has)
    for first in range(len(has)):
        row, place = list[int](), first
        while has[place] != shall[place] and place not in taken and room[place // each]:
            row.append(place)
            taken.add(place)
            room[place // each] -= 1
            place = at[shall[place]]
        for to, origin in zip(row, row[1:] + row[:1], strict=True):
            order[to] = has[origin]
    return torch.tensor(order)


@dataclass(frozen=True)
class Route:
    """Which experts leave a rank and which it takes, on the way from one order to another."""

    rank: int
    sends: list[list[int]]  # to each rank, the places here whose experts it takes, in the order of its own places
    takes: list[list[int]]  # from each rank, the places here that its experts come to
    widest: int  # most experts that a rank takes; it sends as many

    @classmethod
    def between(cls, before: Tensor, after: Tensor, rank: int, ranks: int) -> Route:
        """The route of this rank; the arguments are those of `move`."""
        each = len(before) // ranks
        source = before.argsort()[after].tolist()  # the place each place's expert comes from
        changed = [place for place, origin in enumerate(source) if place != origin]
        return cls(
            rank,
            [
                [source[p] % each for p in changed if p // each == to and source[p] // each == rank]
                for to in range(ranks)
            ],
            [[p % each for p in changed if p // each == rank and source[p] // each == by] for by in range(ranks)],
            max((sum(place // each == to for place in changed) for to in range(ranks)), default=0),
        )

    @property
    def leaving(self) -> int:
        """Experts that leave this rank."""
        return sum(len(places) for to, places in enumerate(self.sends) if to != self.rank)

    def exchange(self, parts: Sequence[Tensor], group: Group, *, later: bool = False) -> tuple[Tensor, Any]:
        """Sends a piece of the experts and takes others' pieces: all ranks of the group call it alike.

        Returns:
            What came, to be `put`, and what tells when it has come (None: it has), if it may come later.
        """
        sending = [place for places in self.sends for place in places]
        sent = parts[0].new_empty((len(sending), parts[0].numel()))
        for row, place in zip(sent, sending, strict=True):
            row.copy_(parts[place])
        received = torch.empty_like(sent)  # as many places here lose an expert as take one
        sizes = ([len(places) for places in self.takes], [len(places) for places in self.sends])
        return received, dist.all_to_all_single(received, sent, *sizes, group=group, async_op=later)

    def put(self, parts: Sequence[Tensor], received: Tensor) -> None:
        """Writes what came over the pieces at the places that it is for."""
        for row, place in zip(received, [place for places in self.takes for place in places], strict=True):
            parts[place].copy_(row)

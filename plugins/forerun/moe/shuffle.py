"""A batch's tokens sent to ranks, in chunks whose sizes differ by at most one, and back.

Every token asks for the rank of most of its experts; where more ask than there is room, those go elsewhere that lose
least by it (the least *regret*).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Shuffle", "assign", "shuffle"]


@dataclass(frozen=True)
class Shuffle:
    """A permutation of a batch's tokens by rank; `inverse` undoes it bit for bit.

    Args:
        order: `[n]` which token comes at each place.
        inverse: `[n]` at which place each token comes.
        sizes: Tokens of each rank, which follow each other.
    """

    order: Tensor
    inverse: Tensor
    sizes: tuple[int, ...]


def assign(share: Tensor, capacity: Tensor | None = None) -> Tensor:
    """`[n]` the rank of each token.

    Plain equivalent where there is room for all: `share.argmax(1)`.

    Args:
        share: `[n, R]` what of a token's experts is expected on each rank; any n.
        capacity: `[R]` most tokens of each rank; None: n/R, rounded up where most tokens ask for it, down elsewhere.

    Raises:
        ValueError: There is not room for all, or a share is NaN.
    """
    if share.ndim != 2 or share.shape[1] < 1 or bool(share.isnan().any()):
        raise ValueError(f"shares {list(share.shape)} must be [n, R], R at least 1, without NaN")
    tokens, ranks = share.shape
    wanted = share.argmax(1) if tokens else share.new_zeros(0, dtype=torch.long)
    if capacity is None:
        capacity = share.new_full((ranks,), tokens // ranks, dtype=torch.long)
        asked = torch.bincount(wanted, minlength=ranks)
        capacity[asked.argsort(descending=True, stable=True)[: tokens % ranks]] += 1
    elif capacity.shape != (ranks,) or bool((capacity < 0).any()) or int(capacity.sum()) < tokens:
        raise ValueError(f"{tokens} tokens do not fit {capacity.tolist()}; expected room for all on {ranks} ranks")
    rank = torch.full((tokens,), -1, dtype=torch.long, device=share.device)
    room, left = capacity.clone(), share.to(torch.float32).clone()
    waiting = torch.arange(tokens, device=share.device)
    while len(waiting):
        left[:, room == 0] = -torch.inf
        best, choice = left[waiting].topk(min(2, ranks), dim=1)
        regret = best[:, 0] - best[:, -1] if ranks > 1 else best[:, 0]
        # The rounds end: each that leaves tokens waiting has filled a rank.
        by_regret = regret.argsort(descending=True, stable=True)
        by_rank = choice[by_regret, 0].argsort(stable=True)
        order = by_regret[by_rank]
        ranked = choice[order, 0]
        asked = torch.bincount(ranked, minlength=ranks)
        place = torch.arange(len(order), device=share.device) - (asked.cumsum(0) - asked)[ranked]
        taken = place < room[ranked]
        rank[waiting[order[taken]]] = ranked[taken]
        room -= torch.minimum(asked, room)
        waiting = waiting[order[~taken]].sort().values
    return rank


def shuffle(rank: Tensor, ranks: int) -> Shuffle:
    """The permutation that brings tokens together by rank (`[n]`), in their own order on each."""
    order = rank.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return Shuffle(order, inverse, tuple(torch.bincount(rank, minlength=ranks).tolist()))

"""A sum per (token, rank) comes back; what stays is computed while the rest travels, where that is worth it.

An expert that is asked twice, for local rows and for those that came, rounds a product of matrices otherwise than one
that is asked once, and reads its weights twice. So this is for the way back that may differ by roundings anyway, and
only where rows took long to come, as a clock on the host sees it: on a GPU the host does not wait, so never there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from forerun.moe.exchange import Group, send

__all__ = ["Compute", "Pace", "Summed", "summed"]

Compute = Callable[[Tensor, Tensor], Tensor]
_ENOUGH = 16  # pairs of each expert: with fewer, reading the weights again is what takes the time
_DEAR = 0.2  # waiting, over computing, from which on
_AGAIN = 32  # batches until it is measured anew


@dataclass
class Pace:
    """What a layer's rank waits, against what it computes, in batches without overlap."""

    waited: float = 0.0  # s, of the last such batch
    computed: float = 0.0  # s
    batches: int = 0  # overlapped since then

    def overlaps(self, pairs: float) -> bool:
        """Whether a batch of so many local pairs for each expert is computed while the rest travels."""
        worth = pairs >= _ENOUGH and self.waited > _DEAR * self.computed and self.batches < _AGAIN
        self.batches += worth
        return worth

    def measured(self, pairs: float, waited: float, computed: float) -> None:
        """A batch without overlap took so long, in seconds; what is too small to be overlapped says nothing."""
        if pairs >= _ENOUGH:
            self.waited, self.computed, self.batches = waited, computed, 0


class Summed(NamedTuple):
    """A batch's answer."""

    output: Tensor  # [n, H]
    leaving: int  # rows that left this rank on their way to experts
    returned: int  # rows of other ranks that this rank answered


def summed(
    hidden: Tensor,
    token: Tensor,
    place: Tensor,
    weight: Tensor,
    experts: int,
    compute: Compute,
    group: Group = None,
    pace: Pace | None = None,
) -> Summed:
    """Each token's weighted sum over its experts, in float32 but for what travels.

    A sum is rounded to the rows' dtype once per rank that a token has experts on: in bfloat16 the result may differ by
    that rounding (2^-8 of each part); in float32 by the order of additions, and by how an expert's product of matrices
    rounds for another number of rows.

    Plain equivalent: `sum(weight[t, e] * expert[e](hidden[t]) for e in chosen[t])`.

    Args:
        hidden: `[n, H]`.
        token: `[p]` the token of each (token, expert) pair, pairs in the order of their places.
        place: `[p]` rising; where each pair's expert lies: rank r holds the places from r E/R on.
        weight: `[p]` of each pair.
        experts: E, which the group's ranks divide.
        compute: Answers rows `[p', H]` that lie expert by expert, `[E/R]` of each.
        group: Of the exchange; None: all ranks.
        pace: Of this layer, by which overlap is decided; None: there is none.
    """
    sending = send(hidden, token, place, experts, group, weight)
    each = sending.local_use.shape[1]
    pairs = float((sending.local_use != 0).sum()) / each
    # How the ranks decide may differ: the collectives are the same either way.
    overlaps = pace is not None and pace.overlaps(pairs)
    own = hidden.new_zeros(sending.local_rows.shape if overlaps else (0, hidden.shape[1]), dtype=torch.float32)
    early = torch.arange(each, device=hidden.device) < each // 2  # experts whose local rows are computed on the way out
    if overlaps:
        _add(own, sending.local_rows, sending.local_use * early, compute)
    start = time.perf_counter()
    arrived = sending.wait()
    came = time.perf_counter()
    here = dist.get_rank(group)
    local = slice(sum(arrived.got_rows[:here]), sum(arrived.got_rows[: here + 1]))
    if overlaps:
        arrived.use[local] = 0
    part = hidden.new_zeros(arrived.rows.shape, dtype=torch.float32)
    _add(part, arrived.rows, arrived.use, compute)
    done = time.perf_counter()
    back = hidden.new_empty((sum(arrived.sent_rows), hidden.shape[1]))
    returning = dist.all_to_all_single(
        back, part.to(hidden.dtype), arrived.sent_rows, arrived.got_rows, group=group, async_op=True
    )
    if overlaps:
        _add(own, sending.local_rows, sending.local_use * ~early, compute)
    returning.wait()
    if pace is not None and not overlaps:
        pace.measured(pairs, came - start + time.perf_counter() - done, done - came)
    if overlaps:
        first = sum(arrived.sent_rows[:here])
        back[first : first + len(own)] = own.to(hidden.dtype)
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    total.index_add_(0, arrived.token, back.float())
    return Summed(total.to(hidden.dtype), arrived.leaving(here), sum(arrived.got_rows) - arrived.got_rows[here])


def _add(total: Tensor, rows: Tensor, use: Tensor, compute: Compute) -> None:
    """Adds to each row's total what its experts make of it."""
    expert, row = use.t().nonzero(as_tuple=True)
    answer = compute(rows.index_select(0, row), (use != 0).sum(0))
    total.index_add_(0, row, answer.float() * use[row, expert][:, None])

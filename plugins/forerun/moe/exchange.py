"""Tokens to their experts' ranks and back over a process group, each token to a rank once.

What stays on its rank is not sent. Two ways back:

- `return_pairs`: a row per (token, expert), in the order of the pairs, so that a host sums them by its own expression,
  bit for bit as if it had sent a row per pair.
- `return_sums`: a row per (token, rank), weighted and summed there in float32; fewer bytes, another order of additions.

Every rank of the group calls each function, whatever it has to send: nothing is also a batch. For inference: nothing
here has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Arrived", "dispatch", "return_pairs", "return_sums"]

Group = dist.ProcessGroup | None


@dataclass(frozen=True, eq=False)
class Arrived:
    """What a rank was sent, and by which way it goes back.

    Args:
        rows: `[m, H]` hidden states, one per (token, sender), sender by sender.
        row: `[p]` the row of each pair, pairs sender by sender in their senders' order.
        pairs: `[R, E/R]` how many of each sender's pairs are for each expert here.
        sent_pairs: Pairs sent to each rank.
        sent_rows: Rows sent to each rank.
        got_rows: Rows from each rank.
        token: `[sum(sent_rows)]` the token of each row that was sent.
        tokens: How many tokens this rank has.
        group: Of the exchange.
    """

    rows: Tensor
    row: Tensor
    pairs: Tensor
    sent_pairs: list[int]
    sent_rows: list[int]
    got_rows: list[int]
    token: Tensor
    tokens: int
    group: Group

    @property
    def got_pairs(self) -> list[int]:
        """Pairs from each rank."""
        return [int(count) for count in self.pairs.sum(1).tolist()]

    def leaving(self, rank: int) -> int:
        """Rows that this rank, whose number in the group is given, sent over the wire."""
        return sum(self.sent_rows) - self.sent_rows[rank]


def dispatch(hidden: Tensor, token: Tensor, place: Tensor, experts: int, group: Group = None) -> Arrived:
    """Sends tokens to the ranks of their experts.

    Args:
        hidden: `[n, H]`.
        token: `[p]` the token of each (token, expert) pair, pairs in the order of their places.
        place: `[p]` rising; where each pair's expert lies: rank r holds the places from r E/R on.
        experts: E, which the group's ranks divide.
        group: Of the exchange; None: all ranks.
    """
    ranks = dist.get_world_size(group)
    each = experts // ranks
    to = place // each
    # One row per (rank, token), by rank, then by token.
    single, position = torch.unique(to * max(len(hidden), 1) + token, return_inverse=True)
    row_to, row_token = single // max(len(hidden), 1), single % max(len(hidden), 1)
    counts = torch.empty(ranks, each + 1, dtype=torch.long, device=hidden.device)
    counts[:, :each] = torch.bincount(place, minlength=experts).view(ranks, each)
    counts[:, each] = torch.bincount(row_to, minlength=ranks)
    told = torch.empty_like(counts)
    dist.all_to_all_single(told, counts, group=group)
    sizes = torch.stack((counts[:, :each].sum(1), counts[:, each], told[:, :each].sum(1), told[:, each]))
    sent_pairs, sent_rows, got_pairs, got_rows = sizes.tolist()
    rows = _exchanged(hidden[row_token], sent_rows, got_rows, group)
    # A row's number among those for its rank; with the rows of the senders before, its number over there.
    start = counts[:, each].cumsum(0) - counts[:, each]
    row = _exchanged((position - start[to]).to(torch.int32), sent_pairs, got_pairs, group).long()
    before = torch.tensor(got_rows, device=row.device).cumsum(0) - torch.tensor(got_rows, device=row.device)
    row += before.repeat_interleave(torch.tensor(got_pairs, device=row.device))
    return Arrived(rows, row, told[:, :each], sent_pairs, sent_rows, got_rows, row_token, len(hidden), group)


def return_pairs(arrived: Arrived, computed: Tensor) -> Tensor:
    """`[p, H]` each pair's result, in the order in which the pairs were dispatched.

    Args:
        arrived: Of `dispatch`.
        computed: `[p', H]` a row for each pair that arrived, in their order.
    """
    return _exchanged(computed, arrived.got_pairs, arrived.sent_pairs, arrived.group)


def return_sums(arrived: Arrived, computed: Tensor, weight: Tensor) -> Tensor:
    """`[n, H]` each token's weighted sum over its pairs, in float32 but for what travels.

    A sum is rounded to the rows' dtype once per rank that a token has experts on: in bfloat16 the result may differ by
    that rounding (2^-8 of each part); in float32 by the order of additions alone.

    Args:
        arrived: Of `dispatch`.
        computed: `[p', H]` a row for each pair that arrived, in their order.
        weight: `[p]` of each pair, in the order in which they were dispatched.
    """
    scale = _exchanged(weight.float(), arrived.sent_pairs, arrived.got_pairs, arrived.group)
    part = torch.zeros(arrived.rows.shape, dtype=torch.float32, device=computed.device)
    part.index_add_(0, arrived.row, computed.float() * scale[:, None])
    back = _exchanged(part.to(computed.dtype), arrived.got_rows, arrived.sent_rows, arrived.group)
    total = torch.zeros(arrived.tokens, computed.shape[1], dtype=torch.float32, device=computed.device)
    return total.index_add_(0, arrived.token, back.float()).to(computed.dtype)


def _exchanged(rows: Tensor, sent: list[int], got: list[int], group: Group) -> Tensor:
    out = rows.new_empty((sum(got), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), output_split_sizes=got, input_split_sizes=sent, group=group)
    return out

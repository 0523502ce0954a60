"""Tokens to their experts' ranks and back over a process group, each token to a rank once.

A row is a hidden state and what it is for: a byte or, where weights are given, a float32 for each expert of the rank
that it goes to. So a round trip takes three collectives, as many as stock expert parallelism: how many rows, the rows,
the way back. Two ways back:

- `return_pairs`: a row per (token, expert), in the order of the pairs, so that a host sums them by its own expression,
  bit for bit as if it had sent a row per pair.
- `overlap.summed`, the whole way there and back: a row per (token, rank), summed there in float32 by weights that
  travel with the rows; fewer bytes, another order of additions.

Every rank of the group calls each function, whatever it has to send: nothing is also a batch. For inference: nothing
here has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Arrived", "Group", "Sending", "dispatch", "exchanged", "return_pairs", "row_bytes", "send"]

Group = dist.ProcessGroup | None
_ALIGN = 8  # bytes: rows of any dtype can be looked at as such


@dataclass(frozen=True, eq=False)
class Arrived:
    """What a rank was sent, and by which way it goes back.

    Args:
        rows: `[m, H]` hidden states, one per (token, sender), sender by sender.
        use: `[m, E/R]` what each row is for: 1 or the pair's weight for an expert that its token takes, 0 for others.
        sent_pairs: Pairs sent to each rank.
        sent_rows: Rows sent to each rank.
        got_rows: Rows from each rank.
        token: `[sum(sent_rows)]` the token of each row that was sent.
        group: Of the exchange.
    """

    rows: Tensor
    use: Tensor
    sent_pairs: Tensor  # [R]
    sent_rows: list[int]
    got_rows: list[int]
    token: Tensor
    group: Group

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        row, expert = self.use.nonzero(as_tuple=True)
        each, ranks = self.use.shape[1], len(self.got_rows)
        sender = torch.arange(ranks, device=row.device).repeat_interleave(_tensor(self.got_rows, row))
        key, order = (sender[row] * each + expert).sort(stable=True)
        return row[order], torch.bincount(key, minlength=ranks * each).view(ranks, each)

    @property
    def row(self) -> Tensor:
        """`[p]` the row of each pair, pairs sender by sender in their senders' order."""
        return self._pairs[0]

    @property
    def pairs(self) -> Tensor:
        """`[R, E/R]` how many of each sender's pairs are for each expert here."""
        return self._pairs[1]

    def leaving(self, rank: int) -> int:
        """Rows that this rank, whose number in the group is given, sent over the wire."""
        return sum(self.sent_rows) - self.sent_rows[rank]


@dataclass(frozen=True, eq=False)
class Sending:
    """Rows on their way: those that stay can be used at once."""

    local_rows: Tensor  # [m, H] of this rank's tokens, for experts here
    local_use: Tensor  # [m, E/R]
    arriving: Arrived  # whose rows are not there yet
    _handle: Any

    def wait(self) -> Arrived:
        """All rows, those that stayed among them.

        Raises:
            RuntimeError: A rank is lost, or did not send in the group's time.
        """
        self._handle.wait()
        return self.arriving


def send(
    hidden: Tensor, token: Tensor, place: Tensor, experts: int, group: Group = None, weight: Tensor | None = None
) -> Sending:
    """Starts sending tokens to the ranks of their experts.

    Args:
        hidden: `[n, H]`.
        token: `[p]` the token of each (token, expert) pair, pairs in the order of their places.
        place: `[p]` rising; where each pair's expert lies: rank r holds the places from r E/R on.
        experts: E, which the group's ranks divide.
        group: Of the exchange; None: all ranks.
        weight: `[p]` of each pair, which travels along; None: nothing does. A pair of weight 0 is not computed.
    """
    ranks, tokens = dist.get_world_size(group), len(hidden)
    each = experts // ranks
    to = place // each
    pair = to * tokens + token
    single = torch.zeros(ranks * tokens, dtype=torch.bool, device=hidden.device)
    single[pair] = True
    counts = single.view(ranks, tokens).sum(1)
    told = torch.empty_like(counts)
    counting = dist.all_to_all_single(told, counts, group=group, async_op=True)
    # Meanwhile the rows are packed: by rank, then by token.
    row_token = single.nonzero().flatten() % max(tokens, 1)
    packed = _Rows.empty(len(row_token), hidden, each, torch.uint8 if weight is None else torch.float32)
    torch.index_select(hidden, 0, row_token, out=packed.rows)
    packed.use.zero_()
    packed.use[single.cumsum(0)[pair] - 1, place - to * each] = 1 if weight is None else weight.float()
    sent_pairs = torch.bincount(to, minlength=ranks)
    counting.wait()
    sent_rows, got_rows = torch.stack((counts, told)).tolist()
    got = _Rows.empty(sum(got_rows), hidden, each, packed.use.dtype)
    handle = dist.all_to_all_single(got.bytes, packed.bytes, got_rows, sent_rows, group=group, async_op=True)
    here = dist.get_rank(group)
    local = slice(sum(sent_rows[:here]), sum(sent_rows[: here + 1]))
    arriving = Arrived(got.rows, got.use, sent_pairs, sent_rows, got_rows, row_token, group)
    return Sending(packed.rows[local], packed.use[local], arriving, handle)


def dispatch(hidden: Tensor, token: Tensor, place: Tensor, experts: int, group: Group = None) -> Arrived:
    """Sends tokens to the ranks of their experts, and waits: the arguments are `send`'s."""
    return send(hidden, token, place, experts, group).wait()


def return_pairs(arrived: Arrived, computed: Tensor) -> Tensor:
    """`[p, H]` each pair's result, in the order in which the pairs were dispatched.

    Args:
        arrived: Of `dispatch`.
        computed: `[p', H]` a row for each pair that arrived, in their order.
    """
    got_pairs, sent_pairs = torch.stack((arrived.pairs.sum(1), arrived.sent_pairs)).tolist()
    return exchanged(computed, got_pairs, sent_pairs, arrived.group)


def exchanged(rows: Tensor, sent: list[int], got: list[int], group: Group) -> Tensor:
    """`[sum(got), …]` so many rows from each rank, for so many of `rows` sent to each."""
    out = rows.new_empty((sum(got), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), output_split_sizes=got, input_split_sizes=sent, group=group)
    return out


@dataclass(frozen=True, eq=False)
class _Rows:
    """Hidden states and their use next to each other, as one thing that is sent."""

    bytes: Tensor  # [m, W]
    rows: Tensor  # [m, H], a view
    use: Tensor  # [m, E/R], a view

    @classmethod
    def empty(cls, count: int, like: Tensor, each: int, use: torch.dtype) -> _Rows:
        width = _aligned(like.shape[1] * like.element_size())
        buffer = torch.empty(count, row_bytes(like, each, use), dtype=torch.uint8, device=like.device)
        rows = buffer[:, : like.shape[1] * like.element_size()].view(like.dtype)
        return cls(buffer, rows, buffer[:, width : width + each * use.itemsize].view(use))


def row_bytes(hidden: Tensor, each: int, use: torch.dtype) -> int:
    """Bytes of a row that is sent.

    Args:
        hidden: `[n, H]`, of which rows are.
        each: E/R, experts of a rank.
        use: uint8, or float32 where weights travel along.
    """
    return _aligned(hidden.shape[1] * hidden.element_size()) + _aligned(each * use.itemsize)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _tensor(counts: list[int], like: Tensor) -> Tensor:
    return torch.tensor(counts, device=like.device)

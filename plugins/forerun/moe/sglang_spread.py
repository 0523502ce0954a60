"""One MoE layer's tokens spread over the ranks, in SGLang: the sum after attention, the experts, all tokens again.

Stock adds up the attention's output on every rank, asks a rank's experts about all tokens, and adds up again. Here each
token is added up, with its residual, on the rank that its experts are expected on; norm and router are asked there;
what its experts elsewhere say comes by an exchange; and all tokens come together again.

Under data-parallel attention tokens are on a rank of their own already: nothing is summed or gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from forerun.moe.choice import Choice
from forerun.moe.exchange import Group, dispatch, return_pairs, row_bytes
from forerun.moe.foresight import Foresight
from forerun.moe.overlap import Pace, summed
from forerun.moe.pieces import Pieces
from forerun.moe.scatter import chunk, gather, scatter_sum
from forerun.moe.shuffle import Shuffle

__all__ = ["Counted", "Ranks", "Spread"]


@dataclass(eq=False)
class Ranks:
    """What the layers of a model have in common.

    Args:
        group: Of the ranks that share the experts.
        rank: This one's number.
        size: R.
        exact: Whether a row per (token, expert) comes back.
        apart: Whether attention is data-parallel: each rank has tokens of its own.
        foresight: Where tokens go.
        pieces: In which tokens go to the rank that asks their experts, and come back.
        each: Of each rank, tokens of the batch that runs, where each has its own: SGLang may fill them up behind.
        counting: Whether that batch is counted by experts.
    """

    group: Group
    rank: int
    size: int
    exact: bool
    apart: bool
    foresight: Foresight
    pieces: Pieces
    each: Sequence[int] = ()
    counting: bool = False


@dataclass
class Counted:
    """What a layer did on this rank."""

    ours: int = 0  # batches that were spread
    stock: int = 0  # batches that went stock's way
    tokens: int = 0  # of the batches that were spread, on all ranks where attention is tensor-parallel
    pairs: int = 0  # of this rank's tokens and their experts, in those batches
    local: int = 0  # of them whose expert is on this rank: their share is the local activation rate
    rows: int = 0  # that this rank sent to experts elsewhere
    bytes: int = 0  # that this rank sent: halves of the sum, counts, rows there and back
    stock_bytes: int = 0  # that stock's two sums sent in the batches that went its way


@dataclass(eq=False)
class Spread:
    """A layer's state.

    Args:
        ranks: Who shares its experts.
        layer: Its place among the MoE layers.
        experts: E.
        place: `[E]` where each expert lies; None: at its number.
        choice: Between both ways.
    """

    ranks: Ranks
    layer: int
    experts: int
    place: Tensor | None
    choice: Choice
    pace: Pace = field(default_factory=Pace)
    counted: Counted = field(default_factory=Counted)
    chosen: bool = False  # for the batch that runs
    under_way: bool = False  # between `begin` and `end`: the layer's experts are asked about this rank's tokens
    asked: Tensor | None = None  # [E] of a batch that is counted: pairs of each expert, once over all ranks together
    _there: Shuffle | None = None
    _away: Tensor | None = None  # [n] rows that each of this rank's tokens sent
    _seen: Tensor | None = None  # [n] the rank of most of each token's experts

    def begin(self, tokens: int, everywhere: int, row: int) -> bool:
        """Whether a batch is spread; all ranks answer alike.

        Args:
            tokens: n, of the batch on this rank.
            everywhere: Tokens on all ranks together.
            row: Bytes of a token's hidden state.
        """
        ranks = self.ranks
        self.under_way = self.chosen and everywhere > 0
        if not self.under_way:
            self.counted.stock += 1
            self.counted.stock_bytes += 4 * (ranks.size - 1) * everywhere * row // ranks.size
            return False
        self.counted.ours += 1
        self.counted.tokens += everywhere
        if not ranks.apart:
            self._there = ranks.foresight.shuffle(self.layer, tokens)
        return True

    def scatter(self, part: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's tokens, `[n', H]` each: their sums over the ranks, and their residual.

        Args:
            part: `[n, H]` this rank's part of every token.
            residual: `[n, H]` the same on all ranks.
        """
        if self._there is None:
            return part, residual
        mine = self._there.sizes[self.ranks.rank]
        self.counted.bytes += (len(part) - mine) * part.shape[1] * part.element_size()
        ranks = self.ranks
        return scatter_sum(part, self._there, ranks.group, ranks.pieces), chunk(residual, self._there, ranks.rank)

    def saw(self, expert: Tensor) -> None:
        """A batch goes stock's way: each rank has all tokens' experts, `[n, k]`, below 0: none; the first counts."""
        ranks = self.ranks
        if not ranks.counting or ranks.rank:
            return
        most = max(ranks.each, default=0)
        if ranks.each and len(expert) == ranks.size * most:  # filled up to as many on each rank
            expert = torch.cat([part[:own] for part, own in zip(expert.split(most), ranks.each, strict=True)])
        self._count_asked(expert)

    def answer(
        self, hidden: Tensor, weight: Tensor, expert: Tensor, compute: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """`[n', H]` the weighted sum over each of this rank's tokens' experts.

        Args:
            hidden: `[n', H]`.
            weight: `[n', k]`.
            expert: `[n', k]`, below 0: none.
            compute: Answers rows `[p, H]`, each by the expert of that number among this rank's, `[p]`.
        """
        ranks, top_k = self.ranks, expert.shape[1]
        if ranks.each and ranks.each[ranks.rank] < len(expert):
            expert = expert.clone()
            expert[ranks.each[ranks.rank] :] = -1  # of what is no token nobody is asked
        if ranks.counting:
            self._count_asked(expert)
        flat = expert.flatten().long()
        held = flat if self.place is None else torch.where(flat < 0, flat, self.place[flat.clamp(min=0)])
        order = held.argsort(stable=True)
        order = order[held[order] >= 0]
        token, place = order // top_k, held[order]
        self.counted.pairs += len(place)
        self.counted.local += int((place // (self.experts // ranks.size) == ranks.rank).sum())
        self._note(token, place, len(hidden))
        if not ranks.exact:
            by_count = partial(_by_count, compute)
            output, sent, returned = summed(
                hidden, token, place, weight.flatten()[order], self.experts, by_count, ranks.group, self.pace
            )
            self._count(sent, returned, hidden, torch.float32)
            return output
        arrived = dispatch(hidden, token, place, self.experts, ranks.group)
        each = self.experts // ranks.size
        number = torch.arange(each, device=hidden.device).repeat(ranks.size).repeat_interleave(arrived.pairs.flatten())
        answers = compute(arrived.rows.index_select(0, arrived.row), number)
        here = int(arrived.pairs[ranks.rank].sum())
        self._count(arrived.leaving(ranks.rank), len(answers) - here, hidden, torch.uint8)
        answers = return_pairs(arrived, answers)
        slots = hidden.new_zeros(len(flat), hidden.shape[1]).index_copy_(0, order, answers)
        slots = slots.view(*expert.shape, hidden.shape[1])
        return (slots.to(weight.dtype) * weight[..., None]).sum(1).to(hidden.dtype)

    def gather(self, output: Tensor, residual: Tensor) -> Tensor:
        """`[n, H]` all tokens' new residuals, in their own order, on all ranks.

        Args:
            output: `[n', H]` of the experts.
            residual: `[n', H]` before them.
        """
        there, ranks = self._there, self.ranks
        assert there is not None
        told = output + residual
        looks_back, learns = ranks.foresight.looks_back, self.choice.learns
        # Whole numbers travel along as further elements of a row: exact to 256 in any dtype.
        notes = [note for asked, note in ((looks_back, self._seen), (learns, self._away)) if asked]
        if notes:
            told = torch.cat((told, *(note.to(told)[:, None] for note in notes if note is not None)), 1)
        self.counted.bytes += (ranks.size - 1) * max(there.sizes) * told.shape[1] * told.element_size()
        every = gather(told, there, ranks.group, ranks.pieces)
        if looks_back:
            ranks.foresight.saw(every[:, output.shape[1]])
        if learns:
            self.choice.saw(float(every[:, -1].sum(dtype=torch.float64)) / max(len(every), 1), len(every))
        return every[:, : output.shape[1]].contiguous() if notes else every

    def end(self) -> None:
        """The batch is through the layer."""
        self.under_way, self._there, self._away, self._seen = False, None, None, None

    def _count_asked(self, expert: Tensor) -> None:
        flat = expert.flatten().long()
        self.asked = torch.bincount(flat[flat >= 0], minlength=self.experts)

    def _note(self, token: Tensor, place: Tensor, tokens: int) -> None:
        """What of this rank's tokens travels along with them when all come together."""
        if self._there is None or not (self.ranks.foresight.looks_back or self.choice.learns):
            return
        size = self.ranks.size
        to = place // (self.experts // size)
        pairs = torch.bincount(token * size + to, minlength=tokens * size).view(tokens, size)
        self._seen = pairs.argmax(1)
        pairs[:, self.ranks.rank] = 0
        rows = (pairs > 0).sum(1)
        # Back comes a row per pair in exact mode: both ways together count twice as many rows as one of them.
        self._away = (rows + pairs.sum(1)) / 2 if self.ranks.exact else rows

    def _count(self, sent: int, returned: int, hidden: Tensor, use: torch.dtype) -> None:
        each = self.experts // self.ranks.size
        self.counted.rows += sent
        self.counted.bytes += (
            8 * (self.ranks.size - 1)
            + sent * row_bytes(hidden, each, use)
            + returned * hidden.shape[1] * hidden.element_size()
        )


def _by_count(compute: Callable[[Tensor, Tensor], Tensor], rows: Tensor, counts: Any) -> Tensor:
    number = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
    return compute(rows, number)

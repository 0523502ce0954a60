"""A classic `deepspeed.moe` layer whose rows travel once per rank, none of them padding.

Stock sends every rank the same number of rows for each expert, padding included, so that its bytes do not depend on
where experts lie. Gate, experts and sum stay stock's. What its gate drops (`drop_tokens=True`, `used_token`) is dropped
here too: the answer is stock's, and ranks may have unequal numbers of tokens, which stock's exchange does not take.

Exact: the experts compute stock's padded rows, which are put together where they arrive, so that the result is stock's
bit for bit. Otherwise they compute the rows that there are, and one sum per rank comes back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from forerun.moe.deepspeed_state import State, answered
from forerun.moe.exchange import Arrived, dispatch, return_pairs
from forerun.moe.overlap import summed
from forerun_adapters import deepspeed_classic as host

__all__ = ["SpeculativeClassic"]


class SpeculativeClassic(host.ClassicLayer):  # type: ignore[misc]
    """Replaces `MOELayer.forward`."""

    forerun_state: State

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        stock = super().forward
        answer: Tensor = answered(
            self,
            lambda: self._ours(*inputs),
            lambda: host.stock(self, stock, inputs, self.forerun_state.place, self.forerun_state.saw),
            lambda: stock(*inputs, **named),
            inputs[0].shape[:-1].numel(),
            host.batch(self, inputs[0]),
        )
        return answer

    def _ours(self, hidden: Tensor, used: Tensor | None = None) -> Tensor:
        state = self.forerun_state
        answer = host.routed(self, hidden, used)
        # Slot by slot, as the gate answers; stock puts second choices behind all first ones, so with two slots each
        # place is two: its first choices' and its second ones'.
        halves = 2 if len(answer.expert) == 2 else 1
        slot, token = (answer.expert >= 0).nonzero(as_tuple=True)
        expert = answer.expert[slot, token]
        place = expert if state.place is None else state.place[expert]
        key = place * halves + slot if halves == 2 else place
        order = (key * max(len(answer.tokens), 1) + token).argsort()
        slot, token, key = slot[order], token[order], key[order]
        experts = self.ep_size * self.num_local_experts
        state.saw(answer.expert.T)
        if state.exact:
            arrived = dispatch(answer.tokens, token, key, experts * halves, self.ep_group)
            output = return_pairs(arrived, self._padded(arrived, halves, answer.capacity))
            row = torch.full_like(answer.expert, len(output))
            row[slot, token] = torch.arange(len(output), device=row.device)
            output, sent = host.combined(output, answer, row), arrived.leaving(dist.get_rank(self.ep_group))
        else:
            weight, where = answer.weight[slot, token], key // halves
            parts = (answer.tokens, token, where, weight, experts, self._plain, self.ep_group, state.pace)
            output, sent, _ = summed(*parts)
        state.sent += sent
        return output.reshape(hidden.shape)

    def _padded(self, arrived: Arrived, halves: int, capacity: int) -> Tensor:
        """`[p, H]` of what arrived, computed as stock does: C rows of each sender for each expert."""
        counts = arrived.pairs.unflatten(1, (-1, halves)).sum(2).flatten()  # [R * E/R]
        capacity = max(capacity, int(counts.max()))
        group = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        location = torch.arange(len(group), device=counts.device) - (counts.cumsum(0) - counts)[group]
        width = arrived.rows.shape[1]
        rows = arrived.rows.new_zeros(len(counts), capacity, width)
        rows[group, location] = arrived.rows[arrived.row]
        padded = rows.view(self.ep_size, self.num_local_experts, capacity, width)
        if not capacity:
            return arrived.rows[arrived.row]
        return host.computed_padded(self, padded).view_as(rows)[group, location]

    def _plain(self, rows: Tensor, counts: Tensor) -> Tensor:
        """`[p, H]` of rows that lie expert by expert, and no others."""
        return host.computed(self, rows, counts.tolist())

"""An AutoEP layer whose rows travel once per rank."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from forerun.moe.deepspeed_state import State, answered
from forerun.moe.exchange import dispatch, return_pairs
from forerun.moe.overlap import summed
from forerun_adapters import deepspeed_autoep as host

__all__ = ["SpeculativeAutoEP"]


class SpeculativeAutoEP(host.AutoEPLayer):  # type: ignore[misc]
    """Replaces `AutoEPMoELayer.forward`: stock's router, experts and sum, our way there and back."""

    forerun_state: State

    def forward(self, hidden: Tensor) -> Any:
        stock = super().forward
        return answered(
            self,
            lambda: self._ours(hidden),
            lambda: host.stock(self, stock, hidden, self.forerun_state.place, self.forerun_state.saw),
            lambda: stock(hidden),
            hidden.shape[:-1].numel(),
            0,
        )

    def _ours(self, hidden: Tensor) -> Any:
        state = self.forerun_state
        answer = host.routed(self, hidden)
        expert = answer.expert.flatten()
        held = expert if state.place is None else state.place[expert]
        place, order = held.sort(stable=True)
        to = (order // self.top_k, place)
        state.saw(answer.expert)
        if state.looked_at:
            state.seen = _dominant(held, self)
        if state.exact:
            arrived = dispatch(answer.tokens, *to, self.num_experts, self.ep_group)
            output = host.computed(self, arrived.rows.index_select(0, arrived.row), arrived.pairs)
            output = host.combined(self, return_pairs(arrived, output), answer, order, hidden.shape)
            sent = arrived.leaving(dist.get_rank(self.ep_group))
        else:
            weight, compute = answer.weight.flatten()[order], partial(host.computed_together, self)
            output, sent, _ = summed(answer.tokens, *to, weight, self.num_experts, compute, self.ep_group, state.pace)
            output = output.reshape(hidden.shape)
        state.sent += sent
        return host.finished(self, output, answer, hidden)


def _dominant(place: Tensor, layer: Any) -> Tensor:
    """`[n]` the rank of most of each token's experts, pairs token by token; the first of equals."""
    rank = (place // layer.num_local_experts).view(-1, layer.top_k)
    return nn.functional.one_hot(rank, layer.ep_size).sum(1).argmax(1)

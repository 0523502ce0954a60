"""An AutoEP layer whose rows travel once per rank."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from forerun.moe.deepspeed_state import State, answered
from forerun.moe.exchange import dispatch, return_pairs, return_sums
from forerun_adapters import deepspeed_autoep as host

__all__ = ["SpeculativeAutoEP"]


class SpeculativeAutoEP(host.AutoEPLayer):  # type: ignore[misc]
    """Replaces `AutoEPMoELayer.forward`: stock's router, experts and sum, our way there and back."""

    forerun_state: State

    def forward(self, hidden: Tensor) -> Any:
        stock, place = super().forward, self.forerun_state.place
        return answered(
            self, lambda: self._ours(hidden), lambda: host.stock(self, stock, hidden, place), lambda: stock(hidden)
        )

    def _ours(self, hidden: Tensor) -> Any:
        state = self.forerun_state
        answer = host.routed(self, hidden)
        expert = answer.expert.flatten()
        place, order = (expert if state.place is None else state.place[expert]).sort(stable=True)
        arrived = dispatch(answer.tokens, order // self.top_k, place, self.num_experts, self.ep_group)
        state.sent += arrived.leaving(dist.get_rank(self.ep_group))
        if state.counter is not None:
            state.counter.saw(state.index, answer.expert)
        if state.trial is not None:
            elsewhere = int((expert // self.num_local_experts != self.ep_rank).sum())
            state.rows = state.trial.rows(arrived, elsewhere, state.exact)
        if state.exact:
            output = host.computed(self, arrived.rows[arrived.row], arrived.pairs)
            output = host.combined(self, return_pairs(arrived, output), answer, order, hidden.shape)
        else:
            output = host.computed(self, arrived.rows[arrived.row], arrived.pairs)
            output = return_sums(arrived, output, answer.weight.flatten()[order]).reshape(hidden.shape)
        return host.finished(self, output, answer, hidden)

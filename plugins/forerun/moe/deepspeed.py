"""Speculative MoE on DeepSpeed's AutoEP layers, in place: `speculate(model, plan)`, `unspeculate(model)`.

Replaces `AutoEPMoELayer._forward` in inference: a token's hidden state goes to each rank once, not once per expert, and
with a plan the experts lie where it says. Stock's router, experts and sum stay, so with `exact=True` the result is
stock's bit for bit: every expert sees the same rows in the same order.

Not supported: training (without a plan, the stock forward pass runs under gradients; with one, that is an error),
ZeRO stage 3, DeepEP. While a plan is applied
the experts do not lie as a checkpoint expects: saving and loading are refused until `unspeculate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forerun.moe.deepspeed_shuffle import obstacle, shuffle_tokens, unshuffle_tokens
from forerun.moe.exchange import dispatch, return_pairs
from forerun.moe.identity import Identity
from forerun.moe.overlap import Pace, summed
from forerun.moe.plan import Plan
from forerun_adapters import deepspeed as host

__all__ = ["sent_rows", "speculate", "unspeculate"]


@dataclass
class _State:
    """What a layer carries while it is ours."""

    stock: type[nn.Module]
    exact: bool
    order: Tensor | None  # [E] the expert at each place; None: stock's
    place: Tensor | None  # [E] the place of each expert
    hooks: list[Any]
    sent: int = 0  # rows that left this rank on the way there
    pace: Pace = field(default_factory=Pace)
    looked_at: bool = False  # whether `seen` is asked for
    seen: Tensor | None = None  # [n] the rank of most of each token's experts, in the last batch


class _Speculative(host.AutoEPLayer):  # type: ignore[misc]
    """An AutoEP layer whose rows travel once per rank."""

    forerun_state: _State

    def _forward(self, hidden: Tensor) -> Any:
        state = self.forerun_state
        if torch.is_grad_enabled():
            if state.order is not None:
                raise RuntimeError("experts lie by a plan, for inference: use torch.no_grad(), or unspeculate(model)")
            return super()._forward(hidden)
        answer = host.routed(self, hidden)
        expert = answer.expert.flatten()
        place, order = (expert if state.place is None else state.place[expert]).sort(stable=True)
        to = (order // self.top_k, place)
        if state.looked_at:
            state.seen = _dominant(expert if state.place is None else state.place[expert], self)
        if state.exact:
            arrived = dispatch(answer.tokens, *to, self.num_experts, self.ep_group)
            output = host.computed(self, arrived.rows.index_select(0, arrived.row), arrived.pairs)
            output = host.combined(self, return_pairs(arrived, output), answer, order, hidden.shape)
            state.sent += arrived.leaving(dist.get_rank(self.ep_group))
        else:
            weight, compute = answer.weight.flatten()[order], partial(host.computed_together, self)
            output, sent = summed(answer.tokens, *to, weight, self.num_experts, compute, self.ep_group, state.pace)
            output, state.sent = output.reshape(hidden.shape), state.sent + sent
        return host.finished(self, output, answer, hidden)


@torch.no_grad()
def speculate(model: Any, plan: Plan | None = None, *, exact: bool = True, shuffle: bool = True) -> None:
    """Makes a model's AutoEP layers send each token to a rank once, its experts placed by a plan.

    All ranks call it alike; it is undone by `unspeculate`. Where attention is tensor-parallel (DeepSpeed's
    `tensor_parallel` beside `expert_parallel`), a token's experts are asked from one rank: see
    `forerun.moe.deepspeed_shuffle`.

    Args:
        model: The model, or DeepSpeed's engine around it.
        plan: Where experts lie; None: where they are.
        exact: A row per (token, expert) comes back and stock's own sum is taken: bit for bit stock's result. False: a
            sum per rank comes back, fewer bytes, and local rows are computed while the rest travels where that is worth
            it; see `forerun.moe.overlap.summed` for how far the result may be off.
        shuffle: Where attention is tensor-parallel: a token goes to the rank that the plan expects its experts on;
            False: tokens are split in their order.

    Raises:
        ValueError: The model has no AutoEP layer, one of settings that only stock serves, is speculated already, or the
            plan is of another model or number of ranks. Nothing was changed.
    """
    module = getattr(model, "module", model)
    found = host.layers(module)
    if not found:
        raise ValueError(f"{type(module).__name__} has no AutoEP layer: deepspeed.initialize it with expert_parallel")
    for _, name, layer in found:
        reason = host.obstacle(layer) or obstacle(module, name, layer)
        if isinstance(layer, _Speculative):
            raise ValueError(f"{name} is speculated already: unspeculate(model) first")
        if reason is not None:
            raise ValueError(f"{name} cannot be speculated: {reason}")
    first = found[0][2]
    if plan is not None:
        numbers = tuple(number for number, _, _ in found)
        plan.refuse_other(Identity(host.name_of(module), numbers, first.num_experts, first.top_k), first.ep_size)
    for index, (_, _, layer) in enumerate(found):
        order = None if plan is None else torch.from_numpy(plan.order[index]).to(layer.router.gate.weight.device)
        hooks = []
        if order is not None:
            _move(layer, torch.arange(len(order)), order.cpu())
            hooks.append(layer.register_state_dict_pre_hook(_refuse_checkpoint))
            hooks.append(layer.register_load_state_dict_pre_hook(_refuse_checkpoint))
        layer.forerun_state = _State(type(layer), exact, order, None if order is None else order.argsort(), hooks)
        layer.__class__ = _Speculative
    if shuffle_tokens(module, [(name, layer) for _, name, layer in found], plan if shuffle else None):
        for _, _, layer in found:
            layer.forerun_state.looked_at = True


@torch.no_grad()
def unspeculate(model: Any) -> None:
    """Leaves the model as it was: stock layers, experts where they were, bit for bit. All ranks call it."""
    module = getattr(model, "module", model)
    unshuffle_tokens(module)
    for _, _, layer in host.layers(module):
        state: _State | None = getattr(layer, "forerun_state", None)
        if state is None:
            continue
        for hook in state.hooks:
            hook.remove()
        if state.order is not None:
            _move(layer, state.order.cpu(), torch.arange(len(state.order)))
        layer.__class__ = state.stock
        del layer.forerun_state


def sent_rows(model: Any) -> int:
    """Rows that left this rank on their way to experts since `speculate`."""
    found = host.layers(getattr(model, "module", model))
    return sum(layer.forerun_state.sent for _, _, layer in found if isinstance(layer, _Speculative))


def _dominant(place: Tensor, layer: Any) -> Tensor:
    """`[n]` the rank of most of each token's experts, pairs token by token; the first of equals."""
    rank = (place // layer.num_local_experts).view(-1, layer.top_k)
    return nn.functional.one_hot(rank, layer.ep_size).sum(1).argmax(1)


def _move(layer: Any, before: Tensor, after: Tensor) -> None:
    """Moves experts between ranks, a parameter at a time; `before`, `after` `[E]`: the expert at each place."""
    rank, each = dist.get_rank(layer.ep_group), layer.num_local_experts
    where = before.argsort()  # the place of each expert
    mine = slice(rank * each, (rank + 1) * each)
    held, wanted = before[mine].tolist(), after[mine]
    source = where[wanted] // each
    # Each pair of ranks exchanges experts in the order of their numbers.
    asked = [
        [e for e in sorted(after[to * each : (to + 1) * each].tolist()) if e in held] for to in range(layer.ep_size)
    ]
    arriving = [e for sender in range(layer.ep_size) for e in sorted(wanted[source == sender].tolist())]
    got = [int((source == sender).sum()) for sender in range(layer.ep_size)]
    leaving = [held.index(e) for part in asked for e in part]
    ordered = [arriving.index(e) for e in wanted.tolist()]
    for parameter in layer.experts.parameters():
        sent, received = parameter.data[leaving].contiguous(), torch.empty_like(parameter.data)
        dist.all_to_all_single(received, sent, got, [len(part) for part in asked], group=layer.ep_group)
        parameter.data.copy_(received[ordered])


def _refuse_checkpoint(*_: Any) -> None:
    raise RuntimeError(
        "experts lie by a plan, not as checkpoints have them: unspeculate(model) before saving or loading"
    )

"""DeepSpeed's classic expert-parallel layers, and what of their computation `forerun.moe.deepspeed_classic` keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from forerun_adapters._require import require

require("deepspeed")

from deepspeed.moe import sharded_moe as _moe  # noqa: E402
from deepspeed.utils import groups as _groups  # noqa: E402
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size as _tensor_parallel  # noqa: E402

__all__ = ["ClassicLayer", "Routed", "batch", "combined", "computed", "computed_padded", "obstacle", "routed", "stock"]

ClassicLayer: Any = _moe.MOELayer


class Routed(NamedTuple):
    """What a layer's gate says of a batch."""

    tokens: Tensor  # [n, H]
    weight: Tensor  # [k, n] float32
    expert: Tensor  # [k, n]; negative: the gate dropped the token there
    capacity: int  # rows that stock sends to each expert, padded


def obstacle(layer: Any) -> str | None:
    """What of the layer's settings only the stock forward pass knows; None: nothing."""
    reasons = (
        (not torch.distributed.is_initialized(), "torch.distributed is not initialised"),
        (layer.use_tutel, "use_tutel"),
        (_groups.mpu is not None and _tensor_parallel(_groups.mpu) > 1, "tensor parallelism (groups.mpu)"),
    )
    reason = next((reason for applies, reason in reasons if applies), None)
    if reason is None and layer.ep_group is None and layer.ep_size != torch.distributed.get_world_size():
        # init_inference leaves the group unset, which all-to-all takes for all ranks.
        return (
            f"it has no expert-parallel group, and its {layer.ep_size} ranks are not all: set_deepspeed_parallelism()"
        )
    return reason


def batch(layer: Any, hidden: Tensor) -> int:
    """What has to be the same on all ranks for stock to take a batch; negative: it does not take it.

    Its exchange may ask for as many tokens on every rank, and its gate for some at least.
    """
    gate, tokens = layer.gate, hidden.shape[:-1].numel()
    if gate.k == 1 and tokens < gate.min_capacity:
        return -1
    agreed = gate.k > 1 and not gate.drop_tokens and gate.ep_group is not None  # on a capacity
    return 0 if agreed else tokens


def routed(layer: Any, hidden: Tensor, used: Tensor | None) -> Routed:
    """Asks the layer's gate, and keeps its loss and counts as the stock layer does."""
    tokens = hidden.reshape(-1, hidden.shape[-1])
    gate, fewest = layer.gate, layer.gate.min_capacity
    if not gate.drop_tokens:
        gate.min_capacity = 0  # of no use then, but a batch of fewer tokens would be refused
    try:
        layer.l_aux, capacity, _, expert, _, weight, layer.exp_counts = gate(tokens, used, True, False)
    finally:
        gate.min_capacity = fewest
    return Routed(tokens, weight, expert.long(), int(capacity))


def computed_padded(layer: Any, rows: Tensor) -> Tensor:
    """`[R, E/R, C, H]` the layer's experts over rows of that shape."""
    output: Tensor = layer.experts(rows)
    return output.reshape(rows.shape)


def computed(layer: Any, rows: Tensor, counts: list[int]) -> Tensor:
    """`[p, H]` the layer's experts over rows that lie expert by expert, `counts` `[E/R]` of each."""
    parts = []
    for expert, part in zip(layer.experts.deepspeed_experts, rows.split(counts), strict=True):
        if len(part):
            output = expert(part[None, None])
            parts.append((output[0] if isinstance(output, tuple) else output).reshape(part.shape))
    return torch.cat(parts) if parts else rows


def combined(output: Tensor, answer: Routed, row: Tensor) -> Tensor:
    """`[n, H]` the stock sum over a token's experts: row `[k, n]` of each in `output` `[p, H]`; p: dropped."""
    result: Tensor = _moe._sparse_decode(output, row, answer.weight, len(answer.tokens))
    return result


def stock(
    layer: Any,
    forward: Any,
    inputs: tuple[Any, ...],
    place: Tensor | None,
    saw: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The stock forward pass where experts lie elsewhere.

    Args:
        layer: The layer.
        forward: Stock's.
        inputs: Its arguments.
        place: `[E]` the place of each expert; None: stock's.
        saw: Is told the experts `[n, k]` that the gate chose; negative: dropped.
    """

    def elsewhere(_gate: Any, _inputs: Any, output: Any) -> Any:
        expert = output[3].long()
        if saw is not None:
            saw(expert.T)
        if place is None:
            return output
        there = torch.where(expert < 0, expert, place[expert.clamp(min=0)]).to(output[3].dtype)
        return *output[:3], there, *output[4:]

    hook = layer.gate.register_forward_hook(elsewhere)
    try:
        answer: Tensor = forward(*inputs)
    finally:
        hook.remove()
    return answer

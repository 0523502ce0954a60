"""DeepSpeed's AutoEP layers, and what of their computation `forerun.moe.deepspeed_autoep` keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from forerun_adapters._require import require

require("deepspeed")

from deepspeed.module_inject import auto_ep_layer as _layer  # noqa: E402
from deepspeed.moe.ep_kernels import TOKEN_GROUP_ALIGN_SIZE_M as _ALIGN  # noqa: E402

__all__ = ["AutoEPLayer", "Routed", "combined", "computed", "computed_together", "finished", "obstacle", "routed"]

AutoEPLayer: Any = _layer.AutoEPMoELayer


class Routed(NamedTuple):
    """What a layer's router says of a batch."""

    tokens: Tensor  # [n, H]
    weight: Tensor  # [n, k]
    expert: Tensor  # [n, k]


def obstacle(layer: Any) -> str | None:
    """What of the layer's settings only the stock forward pass knows; None: nothing."""
    backend = getattr(layer, "comm_backend", "comm")  # since 0.19.7; remove when deepspeed >= 0.19.7
    reasons = (
        (
            layer.ep_group is None,
            "it has no expert-parallel group yet (deepspeed.initialize, or set_deepspeed_parallelism)",
        ),
        (backend != "comm", f"comm_backend {backend!r}"),
        (getattr(layer, "async_split_plan", False), "async_split_plan"),
        (layer.score_apply != "post", f"score_apply {layer.score_apply!r}"),
        (layer.combine_impl == "fused_weighted_sum", "combine_impl 'fused_weighted_sum'"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def routed(layer: Any, hidden: Tensor) -> Routed:
    """Asks the layer's router, and counts as the stock layer does."""
    tokens = hidden.reshape(-1, hidden.shape[-1])
    answer = _layer.RouterOutput(*layer.router(tokens, layer.expert_bias))
    layer.tokens_per_expert.add_(answer.num_tokens_per_expert)
    return Routed(tokens, answer.top_scores, answer.selected_experts)


def computed(layer: Any, rows: Tensor, pairs: Tensor) -> Tensor:
    """`[p, H]` the layer's experts over rows that came sender by sender, `pairs` `[R, E/R]` of each for each expert.

    Bit for bit what stock computes: each expert sees the same rows, in the same order, padded to the same number. Stock
    fills its indices group by group on a CPU; here they come from sums.
    """
    if layer.experts.use_grouped_mm:
        permuted, indices, aligned, count = _layer.permute_by_local_expert(rows, pairs)
        output: Tensor = _layer.unpermute_by_local_expert(layer.experts(permuted, aligned), indices, count)
        return output
    each = pairs.sum(0)
    padded = (each.clamp(min=_ALIGN) + _ALIGN - 1) // _ALIGN * _ALIGN
    first = padded.cumsum(0) - padded + pairs.cumsum(0) - pairs  # [R, E/R] where each group begins
    counts = pairs.flatten()
    shift = first.flatten() - (counts.cumsum(0) - counts)
    place = torch.arange(len(rows), device=rows.device) + shift.repeat_interleave(counts)
    given = rows.new_zeros(int(padded.sum()), rows.shape[1]).index_copy_(0, place, rows)
    answer: Tensor = layer.experts(given, padded)
    return answer.index_select(0, place)


def computed_together(layer: Any, rows: Tensor, counts: Tensor) -> Tensor:
    """`[p, H]` the layer's experts over rows that lie expert by expert, `counts` `[E/R]` of each.

    Groups are padded only for the grouped product of matrices, which asks for it.
    """
    if layer.experts.use_grouped_mm:
        return computed(layer, rows, counts[None])
    output: Tensor = layer.experts(rows, counts)
    return output


def combined(layer: Any, output: Tensor, answer: Routed, order: Tensor, shape: Any) -> Tensor:
    """The stock sum over a token's experts: `output` `[p, H]` in `order` of the pairs."""
    result: Tensor = _layer.combine_from_routed(
        output,
        top_scores=answer.weight,
        token_indices_sorted=order,
        top_k=layer.top_k,
        score_apply=layer.score_apply,
        combine_impl=layer.combine_impl,
        shape=shape,
    )
    return result


def finished(layer: Any, output: Tensor, answer: Routed, hidden: Tensor) -> Any:
    """What the stock layer does after its experts: shared experts, output shape, router logits."""
    if hasattr(layer, "_finalize_output"):
        return layer._finalize_output(output, answer.tokens, hidden, hidden.shape[-1])
    # Inside of `_forward` before 0.19.7; remove when deepspeed >= 0.19.7
    flat = layer.moe_output_shape == "flat"
    if flat:
        output = output.reshape(answer.tokens.shape)
    if layer.shared_experts is not None:
        gate = layer.shared_experts_gate
        shared = layer.shared_experts(answer.tokens if flat or gate is not None else hidden)
        if gate is not None:
            shared = torch.sigmoid(gate(answer.tokens)) * shared
        output = output + shared.reshape_as(output)
    logits, layer._cached_router_logits = layer._cached_router_logits, None
    return (output, logits) if layer.return_router_logits else output


def stock(
    layer: Any, forward: Any, hidden: Tensor, place: Tensor | None, saw: Callable[[Tensor], None] | None = None
) -> Any:
    """The stock forward pass where experts lie elsewhere.

    Args:
        layer: The layer.
        forward: Stock's, of a hidden state.
        hidden: `[B, S, H]`.
        place: `[E]` the place of each expert; None: stock's.
        saw: Is told the experts `[n, k]` that the router chose.
    """

    def elsewhere(_router: Any, _inputs: Any, output: Any) -> Any:
        weight, expert, counts = output
        if saw is not None:
            saw(expert)
        if place is None:
            return output
        return weight, place[expert], torch.empty_like(counts).index_copy_(0, place, counts)

    before = None if place is None else layer.tokens_per_expert.clone()
    hook = layer.router.register_forward_hook(elsewhere)
    try:
        return forward(hidden)
    finally:
        hook.remove()
        if before is not None:  # counted by places: by experts, as stock does
            layer.tokens_per_expert.copy_(before + (layer.tokens_per_expert - before)[place])

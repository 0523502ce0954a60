"""DeepSpeed, 0.19: AutoEP's expert-parallel layers, and what of their computation `forerun.moe.deepspeed` keeps.

The contract tests of every symbol used here are in `tests/adapters/test_deepspeed.py`.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from forerun_adapters._require import require

require("deepspeed")

from deepspeed.module_inject import auto_ep_layer as _layer  # noqa: E402
from deepspeed.module_inject.auto_ep_comm import COMM_BACKEND as _PLAIN  # noqa: E402
from deepspeed.moe.ep_kernels import TOKEN_GROUP_ALIGN_SIZE_M as _ALIGN  # noqa: E402

__all__ = [
    "AutoEPLayer",
    "Routed",
    "combined",
    "computed",
    "computed_together",
    "finished",
    "layers",
    "name_of",
    "obstacle",
    "routed",
]

AutoEPLayer: Any = _layer.AutoEPMoELayer


class Routed(NamedTuple):
    """What a layer's router says of a batch."""

    tokens: Tensor  # [n, H]
    weight: Tensor  # [n, k]
    expert: Tensor  # [n, k]


def layers(model: nn.Module) -> list[tuple[int, str, Any]]:
    """Number in the model, name and module of each AutoEP layer, in order."""
    found = []
    for name, module in model.named_modules():
        number = re.search(r"\.(\d+)\.", f".{name}.")
        if isinstance(module, AutoEPLayer) and number:
            found.append((int(number[1]), name, module))
    return sorted(found, key=lambda entry: entry[0])


def name_of(model: nn.Module) -> str:
    """The repository's or folder's name, as a profile has it."""
    from forerun_adapters import transformers

    return transformers.name_of(model)


def obstacle(layer: Any) -> str | None:
    """What of the layer's settings only the stock forward pass knows; None: nothing."""
    reasons = (
        (
            layer.ep_group is None,
            "it has no expert-parallel group yet (deepspeed.initialize, or set_deepspeed_parallelism)",
        ),
        (layer.comm_backend != _PLAIN, f"comm_backend {layer.comm_backend!r}"),
        (layer.async_split_plan, "async_split_plan"),
        (layer.score_apply != "post", f"score_apply {layer.score_apply!r}"),
        (layer.combine_impl == "fused_weighted_sum", "combine_impl 'fused_weighted_sum'"),
        (any(hasattr(parameter, "ds_id") for parameter in layer.parameters()), "ZeRO stage 3"),
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
    return layer._finalize_output(output, answer.tokens, hidden, hidden.shape[-1])

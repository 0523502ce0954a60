"""DeepSpeed, 0.19: tensor-parallel attention folded with expert-parallel layers, for `forerun.moe.deepspeed_shuffle`.

The contract tests of every symbol used here are in `tests/adapters/test_deepspeed_folded.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from forerun_adapters._require import require

require("deepspeed")

from deepspeed.module_inject.layers import LinearAllreduce as _LinearAllreduce  # noqa: E402

__all__ = ["DECODERS", "Folding", "Part", "attended", "decoder", "experts_of", "folding"]

# Layers whose forward pass is: norm, attention, add, norm, experts, add.
DECODERS = tuple(
    f"{family}DecoderLayer" for family in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "DeepseekV2", "DeepseekV3")
)


class Folding(NamedTuple):
    """How tensor and expert parallelism share ranks."""

    group: Any  # tensor-parallel
    columns: tuple[int, ...]  # number in its expert-parallel group of each tensor-parallel rank


class Part(_LinearAllreduce):  # type: ignore[misc]
    """A row-parallel projection that leaves its sum over ranks, and its bias, to the caller."""

    def forward(self, input: Tensor) -> Any:
        if torch.is_grad_enabled():
            return super().forward(input)
        return torch.matmul(input, self.weight.transpose(-1, -2))


def folding(layer: Any) -> Folding | None:
    """How an expert-parallel layer shares its ranks with tensor parallelism; None: it does not, as no classic one."""
    handles = getattr(layer, "folding_group_handles", None)
    if handles is None or handles.spec.tp_size <= 1:
        return None
    return Folding(handles.tp_group, tuple(rank % handles.spec.ep_size for rank in handles.tp_ranks))


def decoder(model: nn.Module, name: str) -> Any:
    """The decoder layer around an AutoEP layer of this name.

    Raises:
        ValueError: It is of a kind whose forward pass is not known, or its attention is not tensor-parallel.
    """
    parent, _, child = name.rpartition(".")
    found: Any = model.get_submodule(parent)
    if type(found).__name__ not in DECODERS or child != "mlp":
        raise ValueError(f"{name} is in a {type(found).__name__}; tokens are shuffled in {', '.join(DECODERS)}")
    projection = found.self_attn.o_proj
    if type(projection) is not _LinearAllreduce:
        raise ValueError(
            f"{parent}.self_attn.o_proj is a {type(projection).__name__}, not tensor-parallel: give "
            "tensor_parallel.partition_config a row-parallel o_proj"
        )
    return found


def attended(layer: Any, hidden: Tensor, **named: Any) -> Tensor:
    """`[B, S, H]` a decoder layer's attention output, of this rank's heads where its projection is a `Part`."""
    output: Tensor = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **named)[0]
    return output


def experts_of(layer: Any, tokens: Tensor) -> Tensor:
    """`[n, H]` what a decoder layer's norm and experts make of `[n, H]`."""
    answer = layer.mlp(layer.post_attention_layernorm(tokens[None]))
    output: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return output.reshape(tokens.shape)

"""The benchmark's pinned models, expert-parallel by AutoEP, and the classic layer of the same weights.

- random: OLMoE's shape (64 experts, top 8), random weights, two MoE layers.
- planted: the same; each token id takes experts of one of four hidden blocks, a fifth of its pairs any expert.
- folded: planted on a smaller shape, attention tensor-parallel over the same ranks; requests of ids of any block.
- tiny: `examples/assets/tiny_moe`, trained on the standard library's sources, on files held out of that.

Attention is Qwen3-MoE's, which DeepSpeed also runs tensor-parallel. A rank never holds more than its own experts.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from forerun_adapters import deepspeed as host

__all__ = ["SHAPES", "Pinned", "Shape", "as_classic", "config_of", "pinned", "plant", "planted_routing"]

BLOCKS, NOISE = 4, 0.2


class Shape(NamedTuple):
    """Of a model with random weights."""

    hidden: int
    ffn: int
    experts: int = 64
    top_k: int = 8
    layers: int = 2
    vocabulary: int = 2048


SHAPES = {
    "olmoe": Shape(2048, 1024),
    "small": Shape(256, 128, vocabulary=256),
    "folded": Shape(512, 256, vocabulary=512),
}


class Pinned(NamedTuple):
    """A model and what it is asked."""

    model: nn.Module
    requests: Callable[[int, int, int], Tensor]  # seed, count, length -> [count, length] token ids
    folded: bool = False  # every rank is asked all requests


def pinned(name: str, shape: Shape) -> Pinned:
    """The model of this name, its experts spread over all ranks."""
    if name == "tiny":
        return _tiny()
    if name == "folded":
        return _folded(SHAPES["folded"])
    model = _random(shape)
    if name == "random":
        return Pinned(model, lambda seed, count, length: torch.from_numpy(_uniform(shape, seed, count, length)))
    chosen, block = planted_routing(shape)
    plant(model, chosen)
    topics = [np.flatnonzero(block == topic) for topic in range(BLOCKS)]

    def of_one_topic(seed: int, count: int, length: int) -> Tensor:
        random = np.random.default_rng(seed)
        topic = random.permutation(np.arange(count) % BLOCKS)
        return torch.from_numpy(np.stack([random.choice(topics[one], length) for one in topic]))

    return Pinned(model, of_one_topic)


def expert_parallel(model: nn.Module, preset: str | None = None) -> None:
    """AutoEP's layers into a model, over all ranks, without an engine."""
    ranks = dist.get_world_size()
    settings = {"enabled": True, "autoep_size": ranks, "use_grouped_mm": False}
    groups._create_expert_and_data_parallel(ranks)
    autoep = AutoEP(model, parse_autoep_config(settings | ({"preset_model": preset} if preset else {})))
    specs = autoep.ep_parser()
    with next(model.parameters()).device:
        autoep.replace_moe_layers(specs, ep_size=ranks, ep_rank=dist.get_rank())
    for _, _, layer in host.layers(model):
        layer.set_deepspeed_parallelism()


def as_classic(layer: Any) -> nn.Module:
    """DeepSpeed's classic layer, dropping no token, of an AutoEP layer's weights (shared, not copied)."""
    classic = MoE(
        layer.hidden_size,
        _Expert(),
        num_experts=layer.num_experts,
        ep_size=layer.ep_size,
        k=layer.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    classic.set_deepspeed_parallelism()
    classic.deepspeed_moe.gate.wg.weight = layer.router.gate.weight
    for at, expert in enumerate(classic.deepspeed_moe.experts.deepspeed_experts):
        expert.w1, expert.w2, expert.w3 = layer.experts.w1[at], layer.experts.w2[at], layer.experts.w3[at]
    return _First(classic).eval()


class _Expert(nn.Module):
    """Mixtral's, its weights those of `GroupedExperts`."""

    w1: Tensor
    w2: Tensor
    w3: Tensor

    def forward(self, rows: Tensor) -> Tensor:
        return (nn.functional.silu(rows @ self.w1.t()) * (rows @ self.w3.t())) @ self.w2.t()


class _First(nn.Module):
    def __init__(self, classic: nn.Module) -> None:
        super().__init__()
        self.classic = classic

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.classic(hidden)[0]
        return output


def config_of(shape: Shape) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.ffn,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=shape.hidden // 16,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        max_position_embeddings=512,
    )


def _random(shape: Shape) -> nn.Module:
    config = config_of(shape)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).eval()
    expert_parallel(model)
    rotary = type(model.model.rotary_emb)(config)
    model.to_empty(device="cpu")
    model.model.rotary_emb = rotary
    each, first = shape.experts // dist.get_world_size(), shape.experts // dist.get_world_size() * dist.get_rank()
    with torch.no_grad():
        for buffer_name, buffer in model.named_buffers():
            if "rotary" not in buffer_name:
                buffer.zero_()
        for parameter_name, parameter in model.named_parameters():
            if ".experts." in parameter_name:
                for at in range(each):
                    _drawn(parameter[at], f"{parameter_name} {first + at}")
            elif "norm" in parameter_name:
                parameter.fill_(1)
            else:
                _drawn(parameter, parameter_name)
    return model


def _drawn(parameter: Tensor, name: str) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(f"0 {name}".encode()))
    parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)


def _uniform(shape: Shape, seed: int, count: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, shape.vocabulary, (count, length))


def planted_routing(shape: Shape) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`[V, k]` each id's experts, and `[V]` its block."""
    random = np.random.default_rng(0)
    block_of = random.permutation(shape.experts) % BLOCKS
    block = np.arange(shape.vocabulary) % BLOCKS
    chosen = np.empty((shape.vocabulary, shape.top_k), np.int64)
    for token in range(shape.vocabulary):
        mine = random.permutation(np.flatnonzero(block_of == block[token]))[: shape.top_k]
        others = random.permutation(np.setdiff1d(np.arange(shape.experts), mine))
        noisy = random.random(shape.top_k) < NOISE * (
            1 - shape.top_k / shape.experts
        )  # the others fall on `mine` again
        mine[noisy] = others[: noisy.sum()]
        chosen[token] = mine
    return chosen, block


@torch.no_grad()
def plant(model: Any, chosen: NDArray[np.int64]) -> None:
    """Routers that choose these experts: ids are orthogonal, and what layers add to them is small."""
    vocabulary, hidden = model.model.embed_tokens.weight.shape
    signs = torch.ones(1, 1)
    while len(signs) < max(vocabulary, hidden):
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    assert vocabulary <= hidden == len(signs), "planted ids need a hidden size that is a power of 2, and no more ids"
    model.model.embed_tokens.weight.copy_(signs[:vocabulary])
    wanted = torch.zeros(vocabulary, model.config.num_experts)
    wanted.scatter_(1, torch.from_numpy(chosen), 10 + torch.linspace(0, 1, chosen.shape[1]).repeat(vocabulary, 1))
    for decoder in model.model.layers:
        mlp = decoder.mlp
        gate = mlp.router.gate if hasattr(mlp, "router") else mlp.gate
        gate.weight.copy_(wanted.t() @ signs[:vocabulary] / hidden)
        decoder.self_attn.o_proj.weight.mul_(0.01)
        (mlp.experts.w2 if hasattr(mlp, "router") else mlp.experts.down_proj).mul_(0.01)


def _folded(shape: Shape) -> Pinned:
    """By DeepSpeed's engine, which folds AutoTP and AutoEP; every rank holds the whole model before."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config_of(shape))
    chosen, _ = planted_routing(shape)
    plant(model, chosen)
    ranks = dist.get_world_size()
    specs = [
        {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row"},
        {"patterns": [r".*\.[qkv]_proj\.weight$"], "partition_type": "column"},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "tensor_parallel": {
            "autotp_size": ranks,
            "partition_config": {"use_default_specs": False, "layer_specs": specs},
        },
        "expert_parallel": {"enabled": True, "autoep_size": ranks, "use_grouped_mm": False},
    }
    engine = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())[0]
    engine.eval()

    def requests(seed: int, count: int, length: int) -> Tensor:
        return torch.from_numpy(_uniform(shape, seed, count, length))

    return Pinned(engine.module, requests, folded=True)


def _tiny() -> Pinned:
    from train_tiny_moe import ASSETS, as_stream, sources

    folder = Path(os.environ.get("FORERUN_TINY_MOE", ASSETS))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expert_parallel(model, "mixtral")
    stream = as_stream(sources()[1], AutoTokenizer.from_pretrained(folder))

    def pieces(seed: int, count: int, length: int) -> Tensor:
        starts = np.random.default_rng(seed).integers(0, len(stream) - length, count)
        return torch.stack([stream[start : start + length] for start in starts])

    return Pinned(model, pieces)

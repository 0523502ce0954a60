"""transformers, 5: a causal language model's MoE routers, watched while it runs.

The routers of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V2 and V3 are modules with `top_k` and `num_experts` that
return (logits, weights, indices). The contract tests are in `tests/adapters/test_transformers.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from forerun_adapters._require import require_library

require_library("transformers", extra="deepspeed")

from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig  # noqa: E402

__all__ = ["Router", "config_of", "embeddings", "load", "name_of", "routers", "watched"]


class Router(NamedTuple):
    """One MoE layer's router."""

    layer: int  # the number in its name
    name: str
    module: nn.Module
    experts: int
    top_k: int


def load(path: str, device: str, dtype: str) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a folder or repository, ready to run.

    Raises:
        OSError: There is none.
        ValueError: transformers does not know its kind.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    return model, tokenizer


def config_of(path: str) -> dict[str, Any]:
    """What the `config.json` of a folder or repository says.

    Raises:
        OSError: There is none.
    """
    return dict(PretrainedConfig.get_config_dict(path)[0])


def embeddings(path: str) -> Tensor:
    """`[V, H]` float32 input embeddings of a saved model.

    Raises:
        OSError: There is none.
        ValueError: transformers does not know its kind.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    weight: Tensor = model.get_input_embeddings().weight
    return weight.detach().float()


def name_of(model: nn.Module) -> str:
    """What a profile calls the model: its repository's name, or its folder's."""
    path = str(getattr(getattr(model, "config", None), "_name_or_path", "")) or type(model).__name__
    return Path(path).resolve().name if Path(path).exists() else path


def routers(model: nn.Module) -> list[Router]:
    """The routers in the order of the layers; none where the model has no such."""
    found = []
    for name, module in model.named_modules():
        number = re.search(r"\.(\d+)\.", f".{name}.")
        experts, top_k = getattr(module, "num_experts", None), getattr(module, "top_k", None)
        if number and type(module).__name__.lower().endswith("topkrouter") and experts and top_k:
            found.append(Router(int(number[1]), name, module, int(experts), int(top_k)))
    return sorted(found, key=lambda router: router.layer)


@contextmanager
def watched(found: Sequence[Router]) -> Iterator[dict[int, Tensor]]:
    """Within, each forward pass leaves its experts, `[tokens, k]` on the CPU, under its layer's number.

    Raises:
        TypeError: (in the forward pass) a router returns something else.
    """
    chosen: dict[int, Tensor] = {}

    def hook(router: Router) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            indices = output[-1] if isinstance(output, tuple) and len(output) == 3 else None
            if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.shape[-1] != router.top_k:
                raise TypeError(f"{router.name} returns {type(output).__name__}; expected (logits, weights, indices)")
            chosen[router.layer] = indices.detach().reshape(-1, router.top_k).cpu()

        return keep

    hooks = [router.module.register_forward_hook(hook(router)) for router in found]
    try:
        yield chosen
    finally:
        for entry in hooks:
            entry.remove()

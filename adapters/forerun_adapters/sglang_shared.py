"""SGLang's shared experts, which every token goes to: a slice on each rank in stock, whole where tokens are spread.

Stock lets every rank's slice answer all tokens and adds the answers up. A rank that has tokens of its own needs all
slices, as SGLang itself has them behind its all-to-all backends. `hold` gathers them once; stock's way keeps its own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

from forerun_adapters._require import require

_RELEASE = require("sglang")

from sglang.srt.layers import linear as _linear  # noqa: E402
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod as _Plain  # noqa: E402

__all__ = ["beside", "hold", "misfit"]

_BLOCKS = ("DeepseekV2MoE", "Qwen2MoeSparseMoeBlock")  # whose ways were read, in sglang 0.5.23, and tested
_WEIGHTS = ["down_proj.weight", "gate_up_proj.weight"]
# SGLang asks every module for it before it changes weights while it serves.
_UNCHANGED = "forerun holds shared experts whole, beside their slices: restart the server to change weights"


def beside(block: nn.Module) -> Any | None:
    """The shared expert of a block of experts; None: it has none."""
    return getattr(block, "shared_experts", getattr(block, "shared_expert", None))


def misfit(block: nn.Module, experts: nn.Module, ranks: int) -> str | None:
    """What beside a block's experts only stock serves; None: nothing."""
    shared, known = beside(block), set(experts.modules())
    if shared is not None:
        known |= set(shared.modules())
        kind = f"shared experts of {type(block).__name__}"
        if type(block).__name__ not in _BLOCKS:
            return f"{kind}: expected one of {', '.join(_BLOCKS)}"
        if Version("0.5.23") > _RELEASE:
            return f"{kind} before sglang 0.5.23"
        up, down = shared.gate_up_proj, shared.down_proj
        plain = all(type(one.quant_method) is _Plain and not _packed(one) for one in (up, down))
        if not plain or sorted(name for name, _ in shared.named_parameters()) != _WEIGHTS:
            return f"{kind} that are not two plain weights"
        if block.reduce_results or down.reduce_results:
            return f"{kind} that add up their own answers"
        if down.input_size != ranks * down.input_size_per_partition:
            return f"{kind} that are not spread over the {ranks} ranks (SGLANG_SHARED_EXPERT_TP1)"
    split = (_linear.ColumnParallelLinear, _linear.RowParallelLinear)
    others = [name for name, one in block.named_modules() if isinstance(one, split) and one not in known]
    return f"tensor-parallel modules beside the experts: {', '.join(others)}" if others else None


@torch.no_grad()
def hold(expert: Any, spread: Any, group: Any) -> int:
    """Lets a shared expert answer with its whole weights while its layer is spread; all ranks call it alike.

    Args:
        expert: That `misfit` has nothing against.
        spread: The layer's `forerun.moe.sglang_spread.Spread`.
        group: Of the ranks that have its slices.

    Returns:
        Bytes that this rank holds from now on, beside its slice.
    """
    up, down = (_gathered(one.weight, group) for one in (expert.gate_up_proj, expert.down_proj))
    # [R, 2 I/R, H] and [R, H, I/R], to the whole's [2 I, H] and [H, I]
    up = up.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
    down = down.transpose(0, 1).flatten(1)
    whole = _with(expert, "_modules", gate_up_proj=_weighing(expert.gate_up_proj, up))
    whole._modules["down_proj"] = _weighing(expert.down_proj, down)
    expert.forerun_spread, expert.forerun_whole = spread, whole.forward  # no modules: the model's weights stay as named
    expert._derived_weight_cache_error = _UNCHANGED
    expert.__class__ = _class(type(expert))
    return int(up.nbytes + down.nbytes)


def _class(stock: type[nn.Module]) -> type:
    def forward(expert: Any, *given: Any, **named: Any) -> Any:
        if expert.forerun_spread.under_way:
            return expert.forerun_whole(*given, **named)
        return stock.forward(expert, *given, **named)

    return type(f"Whole{stock.__name__}", (stock,), {"forward": forward})


def _gathered(weight: Tensor, group: Any) -> Tensor:
    every = weight.new_empty(dist.get_world_size(group), *weight.shape)
    dist.all_gather(list(every), weight.detach().contiguous(), group=group)
    return every


def _weighing(linear: nn.Module, weight: Tensor) -> Any:
    return _with(linear, "_parameters", weight=nn.Parameter(weight, requires_grad=False))


def _with(module: nn.Module, kind: str, **changed: Any) -> Any:
    copied = copy.copy(module)
    setattr(copied, kind, {**getattr(module, kind), **changed})
    return copied


def _packed(linear: nn.Module) -> bool:
    return bool(getattr(linear, "use_intel_amx_backend", False))

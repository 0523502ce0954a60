"""What SGLang lacks on a CPU without its kernels: a plugin of the tests' servers, with forerun or without.

- The experts' native forward pass takes global expert numbers. Under expert parallelism it is given local ones, and -1
  for experts elsewhere, which only its kernels know.
- The gate of Qwen2-MoE's shared expert is a Triton kernel, which has no CPU driver.
- Latent attention under the native backend: SGLang gives it Triton's way, which attends to keys that were not written;
  here it attends to the latent ones, as SGLang itself does for a prompt that is known in part.
- `torch.cpu.empty_cache` and `is_current_stream_capturing`, which moving experts and recording ask for.
- The value that the native attention backend fills the lengths of padding with.
- Context-parallel strategies under the native attention backend, for benchmarks that set FORERUN_CPU_STRATEGIES.
- A link so slow that spread tokens are expected to gain, for tests that set FORERUN_CPU_SLOW_SUMS: as if stock's sums
  took a second; with `large`, as if they took that for a hundred tokens, and tokens that are spread for any number.
- `torch.cuda.current_stream`, which a prefill under context parallelism asks for on any device.

Remove each when SGLang runs expert and context parallelism on any CPU.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

__all__ = ["register"]


def register() -> None:
    """Called by SGLang in each process."""
    import torch
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.models.deepseek_common import attention_backend_handler as latent
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.layers.moe.fused_moe_native.moe_forward_native", _experts, HookType.REPLACE)
    gate = "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add"
    HookRegistry.register(gate, _gated, HookType.REPLACE)
    latent.AttentionBackendRegistry.register("torch_native", lambda attention, batch: latent.AttnForwardMethod.MLA)
    for name, answer in (("empty_cache", None), ("is_current_stream_capturing", False)):
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, lambda answer=answer: answer)
    for name in ("get_cpu_graph_seq_len_fill_value", "get_cuda_graph_seq_len_fill_value"):
        setattr(TorchNativeAttnBackend, name, lambda self: 1)
    if os.environ.get("FORERUN_CPU_STRATEGIES"):
        target = f"{TorchNativeAttnBackend.__module__}.TorchNativeAttnBackend.forward_extend"
        HookRegistry.register(target, _extend, HookType.AROUND)
    if os.environ.get("FORERUN_CPU_SLOW_SUMS"):
        from forerun.moe import choice

        large = os.environ["FORERUN_CPU_SLOW_SUMS"] == "large"
        told: dict[str, Any] = {"summed": (0.0, 0.01), "spread": (1.0, 0.0, 0.0)} if large else {"summed": (1.0, 0.0)}
        measure = choice.measure
        choice.measure = lambda *given, **named: replace(measure(*given, **named), **told)
    if not torch.cuda.is_available():
        torch.cuda.current_stream = lambda device=None: None


def _experts(layer: Any, hidden: Any, routed: Any, config: Any) -> Any:
    """`[n, H]` each token's weighted sum over its experts that are here, in the experts' order."""
    import torch
    from torch.nn import functional

    weight, expert, _ = routed
    total = torch.zeros_like(hidden)
    for here in range(layer.w13_weight.shape[0]):
        token, slot = (expert == here).nonzero(as_tuple=True)
        if not len(token):
            continue
        gate, up = functional.linear(hidden[token], layer.w13_weight[here]).chunk(2, -1)
        answer = functional.linear(functional.silu(gate) * up, layer.w2_weight[here])
        total.index_add_(0, token, answer * weight[token, slot].unsqueeze(-1).to(hidden.dtype))
    return total


def _gated(hidden: Any, gate: Any, shared: Any, total: Any) -> None:
    """Adds the shared expert's answer, `[n, H]`, to the total in place, each row times its gate's sigmoid."""
    total.add_(shared * (hidden @ gate).sigmoid()[:, None])


def _extend(original: Any, backend: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, **rest: Any) -> Any:
    """What SGLang's other backends do with a strategy of its own; forerun's has a hook of its own for this one."""
    from sglang.srt.layers.cp.zigzag import ZigzagContextParallelMetadata

    if not isinstance(batch.attn_cp_metadata, ZigzagContextParallelMetadata):
        return original(backend, q, k, v, layer, batch, **rest)
    from forerun.runahead.lowest import attend_last
    from forerun_adapters.sglang_cp import attend, installed

    return attend(backend, installed(), attend_last, q, k, v, layer, batch)

"""SGLang's context parallelism: strategies, the ranks they run on, and the cache they write, in one shape.

The contract tests of every symbol used here are in `tests/adapters/test_sglang_cp.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version

from forerun_adapters._require import require
from forerun_adapters.sglang import Hook

_RELEASE = require("sglang")

from sglang.srt.distributed import parallel_state as _state  # noqa: E402
from sglang.srt.distributed.parallel_state import patch_tensor_parallel_group  # noqa: E402
from sglang.srt.environ import envs as _variables  # noqa: E402
from sglang.srt.layers.cp import base as _cp  # noqa: E402
from sglang.srt.runtime_context import get_parallel  # noqa: E402

__all__ = [
    "ATTENTION",
    "FORWARD",
    "LOAD",
    "STATE",
    "STRATEGY",
    "Metadata",
    "Strategy",
    "attend",
    "check_runner",
    "check_server",
    "choosing",
    "groups",
    "install",
    "installed",
    "is_prefill",
    "on_one_rank",
    "write",
]

# What a strategy hooks.
STRATEGY = "sglang.srt.layers.cp.base.init_cp_strategy"
LOAD = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend"
STATE = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"

_BEFORE_19, _BEFORE_20, _BEFORE_21 = (Version(f"0.5.{patch}") > _RELEASE for patch in (19, 20, 21))
# What there is since 0.5.22. Remove when sglang >= 0.5.22.
_SINCE_22 = Version("0.5.22") <= _RELEASE
_NOT_SHARED = {"enable_cp_tp_group_sharing": False} if _SINCE_22 else {}
_PHYSICAL = {"physical": True} if _SINCE_22 else {}  # of slots

Strategy: Any = _cp.ContextParallelStrategy
Metadata: Any = _cp.BaseContextParallelMetadata
ZIGZAG: Any = _cp.ContextParallelStrategyKind.ZIGZAG


def choosing(choose: Callable[[bool, int], None]) -> Hook:
    """A hook in the place of SGLang's choice of a strategy: `choose(is context parallelism on, ranks)` installs one."""

    def chosen(stock: Any, *, enable_prefill_cp: bool, cp_size: int, **_: Any) -> None:
        choose(enable_prefill_cp, cp_size)
        if _BEFORE_20:
            # Strategies split passes by this variable alone. Remove when sglang >= 0.5.20.
            _variables.SGLANG_ENABLE_CP_V2.set(True)

    def of_arguments(stock: Any, asked: Any) -> None:
        """What is handed over before 0.5.19. Remove when sglang >= 0.5.19."""
        chosen(stock, enable_prefill_cp=asked.enable_prefill_cp, cp_size=asked.attn_cp_size)

    return Hook(STRATEGY, of_arguments if _BEFORE_19 else chosen)


def install(strategy: Any) -> None:
    """Makes a strategy the one of this process; None: there is none."""
    _cp._STRATEGY = strategy


def installed() -> Any:
    """The strategy of this process, made where it was not yet; None: the server was started without one."""
    return _cp.get_cp_strategy()


def is_prefill(batch: Any) -> bool:
    """Whether a forward pass computes prompts, so that context parallelism may split it."""
    return bool(batch.forward_mode.is_context_parallel_extend())


def groups(count: int, timeout: float) -> list[Any]:
    """New process groups of the ranks that share a prompt; each of them calls this.

    Args:
        count: Of groups.
        timeout: Of what is done in them (s).
    """
    own = get_parallel().attn_cp_group
    backend = dist.get_backend(own.device_group)
    limit = timedelta(seconds=timeout)
    return [
        dist.new_group(list(own.ranks), timeout=limit, backend=backend, use_local_synchronization=True)
        for _ in range(count)
    ]


@contextmanager
def on_one_rank() -> Iterator[None]:
    """A model made and run in here has this rank's tokens only, and sees no context parallelism at all.

    Its weights are whole but for tensor parallelism within the rank. SGLang's own scope for a speculative draft does
    this; what the draft leaves as it is, as it never runs under context parallelism, is set here too.
    """
    own, single = get_parallel().attn_tp_group, get_parallel().pp_group  # of one, as `check_server` sees to
    with _alone(own, single) if _BEFORE_21 else patch_tensor_parallel_group(own, owns_attention=True):
        further = {} if _BEFORE_21 else {"enable_prefill_cp": False, "moe_dp_group": single, **_NOT_SHARED}
        with get_parallel().override(**further):
            yield


@contextmanager
def _alone(own: Any, single: Any) -> Iterator[None]:
    """What SGLang's scope does only from 0.5.21 on. Remove when sglang >= 0.5.21.

    Args:
        own: The group of tensor parallelism within the rank.
        single: A group of one.
    """
    seen = dict.fromkeys(("tp", "attn_tp", "moe_tp"), own) | dict.fromkeys(("attn_cp", "moe_ep", "moe_dp"), single)
    told = {f"{kind}_group": group for kind, group in seen.items()}
    told |= {f"{kind}_size": group.world_size for kind, group in seen.items()}
    told |= {f"{kind}_rank": group.rank_in_group for kind, group in seen.items()}
    before = _state._MOE_DP
    # Read as it is, not by the runtime's context: it is the context-parallel group where that is the larger one.
    _state._MOE_DP = single
    try:
        with patch_tensor_parallel_group(own), get_parallel().override(**told):
            yield
    finally:
        _state._MOE_DP = before


def check_server(size: int) -> None:
    """Returns if the server runs in a way that a strategy of so many ranks serves.

    Raises:
        ValueError: It does not; the message says what to change.
    """
    from sglang.srt import runtime_context as context

    parallel = get_parallel()
    wrong = {
        f"--attn-cp-size {parallel.attn_cp_size}: expected {size}": parallel.attn_cp_size != size,
        "--pp-size above 1: pipeline stages are not served": parallel.pp_size > 1,
        "attention data parallelism is not served": parallel.attn_dp_size > 1,
        "expert parallelism is not served: every rank holds all experts": parallel.ep_size > 1,
        "--speculative-algorithm is not served": context.get_spec().speculative_algorithm is not None,
        "--disaggregation-mode is not served": context.get_disagg().disaggregation_mode != "null",
        "--enable-hierarchical-cache is not served": context.get_memory().enable_hierarchical_cache,
        "--kv-cache-dtype is not served": context.get_model().kv_cache_dtype not in (None, "auto"),
        "CUDA graphs are not served: expected --disable-cuda-graph": (
            context.get_device().device != "cpu" and not context.get_exec().graph.disable_cuda_graph
        ),
        "--enable-lora is not served": bool(context.get_lora().enable_lora),
    }
    for reason, holds in wrong.items():
        if holds:
            raise ValueError(reason)


def check_runner(runner: Any, backends: tuple[str, ...]) -> None:
    """Returns if a loaded model can be run by a strategy that moves keys and values.

    Raises:
        ValueError: It cannot; the message says why.
    """
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    config = runner.model_config
    layers = [module for module in runner.model.modules() if isinstance(module, RadixAttention)]
    wrong = {
        "latent attention (MLA) keeps no keys and values to hand on": runner.use_mla_backend,
        "layers without attention, or with several kinds of it, are not served": (
            len(layers) != config.num_hidden_layers
        ),
        "sliding windows are not served": any(layer.sliding_window_size > -1 for layer in layers),
        "capped scores are not served": any(layer.logit_cap > 0 for layer in layers),
        "attention that is not causal is not served": any(
            layer.is_cross_attention or layer.attn_type != AttentionType.DECODER for layer in layers
        ),
        "multimodal models are not served": config.is_multimodal,
        "models that give embeddings are not served": not config.is_generation,
        "SGLang's own context parallelism fails at the first prompt, as the model lacks get_input_embeddings": not any(
            hasattr(runner.model, name) for name in ("get_input_embeddings", "prepare_cp_inputs")
        ),
    }
    for reason, holds in wrong.items():
        if holds:
            raise ValueError(f"{config.hf_config.architectures[0]}: {reason}")
    from sglang.srt.runtime_context import attention_backends

    for backend in attention_backends():
        if backend not in backends:
            raise ValueError(f"--attention-backend {backend} is not served; expected one of {', '.join(backends)}")


def write(pool: Any, layer: Any, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Puts keys and values `[S, H, D]` of one layer into slots `[S]` of the cache."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    pool.set_kv_buffer(layer, KVWriteLoc(slots, **_PHYSICAL), key, value, layer.k_scale, layer.v_scale)


def attend(
    backend: Any,
    strategy: Any,
    attention: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: Any,
    batch: Any,
) -> torch.Tensor:
    """One layer's attention under a strategy, on `torch_native`, which itself knows of none.

    What the backends with context parallelism do: the strategy puts keys and values of the tokens that are attended to
    into the cache, and says which queries attend to how many of them.

    Args:
        backend: SGLang's.
        strategy: That of the process.
        attention: `(query [N, H, D], key [S, K, D], value [S, K, E], scale=) -> [N, H, E]`, of the last N of S tokens.
        query: `[N, H * D]` this rank's own, as the rest.
        key: `[N, K * D]`.
        value: `[N, K * E]`.
        layer: SGLang's.
        batch: The forward pass.
    """
    strategy.materialize_full_kv(batch, layer, key, value)
    pool, tokens_of = backend.token_to_kv_pool, backend.req_to_token_pool.req_to_token
    keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)

    def run(queries: torch.Tensor, ends: torch.Tensor, seen: torch.Tensor, longest: int, **_: Any) -> torch.Tensor:
        found = queries.new_empty(len(queries), layer.tp_q_head_num, layer.v_head_dim)
        bounds, lengths = ends.tolist(), seen.tolist()
        for i, (start, end) in enumerate(pairwise(bounds)):
            slots = tokens_of[batch.req_pool_indices[i], : lengths[i]]
            found[start:end] = attention(queries[start:end], keys[slots], values[slots], scale=layer.scaling)
        return found

    split = query.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
    attended: torch.Tensor = strategy.run_attention(split, batch, query.device, run)
    return attended.flatten(1)

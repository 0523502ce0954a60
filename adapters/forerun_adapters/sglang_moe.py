"""SGLang's mixture-of-experts layers: where a layer's tokens come in, its experts, where they go out.

Between attention and experts a decoder layer adds up the attention's output and its residual and norms it; after the
experts it adds up what they said. `attach` has a built layer ask a `forerun.moe.sglang_spread.Spread` about both, and
`experts_class` stands in for its experts. How a layer does it depends on the release: `forerun_adapters.sglang_stage`
from 0.5.21 on, `forerun_adapters.sglang_communicator` before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor, nn

from forerun_adapters import sglang_shared as _shared
from forerun_adapters._require import require
from forerun_adapters.sglang import Hook
from forerun_adapters.sglang_batch import apart, batch_of, each_of

_RELEASE = require("sglang")

from sglang.srt.layers.moe import get_moe_a2a_backend as _a2a  # noqa: E402
from sglang.srt.layers.moe import topk as _topk  # noqa: E402
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE as _FusedMoE  # noqa: E402
from sglang.srt.layers.moe.token_dispatcher import standard as _standard  # noqa: E402
from sglang.srt.managers.utils import is_health_check_generate_req as _is_health_check  # noqa: E402
from sglang.srt.runtime_context import get_exec as _exec  # noqa: E402
from sglang.srt.runtime_context import get_flags as _flags  # noqa: E402
from sglang.srt.runtime_context import get_lora as _lora  # noqa: E402
from sglang.srt.runtime_context import get_parallel as _parallel  # noqa: E402
from sglang.srt.runtime_context import get_schedule as _schedule  # noqa: E402

_boundary: Any = import_module(
    "forerun_adapters.sglang_stage" if Version("0.5.21") <= _RELEASE else "forerun_adapters.sglang_communicator"
)

__all__ = [
    "FORWARD",
    "LOADED",
    "LOCAL",
    "MADE",
    "ROUTED",
    "STATE",
    "Found",
    "all_reduce",
    "apart",
    "attach",
    "batch_of",
    "computed",
    "each_of",
    "experts_class",
    "experts_of",
    "group",
    "is_draft",
    "layers",
    "most_tokens",
    "name_of",
    "obstacle",
    "placed",
    "rank",
    "ranks",
    "routed",
    "routing",
    "server_obstacle",
    "top_k_of",
    "weights",
]

FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
LOADED = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
LOCAL = "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE._map_global_expert_id_to_local_expert_id"
# Where a request gets its token ids, in the process that knows which requests wait for their answers.
MADE = "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object"
# Where its data-parallel rank is asked for: what several tokenizer workers made, which load no plugins, is named here.
# Nor does the process that asks, before 0.5.22. Hook it on all releases when sglang >= 0.5.22.
ROUTED = "sglang.srt.managers.data_parallel_controller.DataParallelController.maybe_external_dp_rank_routing"
_ASKS = Version("0.5.22") <= _RELEASE
STATE = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"

# Fails in SGLang itself, which norms a rank's heads as if they were all. Remove when SGLang serves it on several ranks.
_UNSERVED = {"OlmoeDecoderLayer": ", and stock cannot serve it with --tp-size above 1 either"}


class Found(NamedTuple):
    """A mixture-of-experts layer of a model."""

    number: int  # of the decoder layer
    name: str  # of its experts
    experts: Any  # FusedMoE
    decoder: Any  # the module that has them
    shared: Any | None = None  # the expert beside them that every token goes to


def layers(model: nn.Module) -> list[Found]:
    """The layers in order."""
    return sorted(_layers(model), key=lambda found: found.number)


def _layers(model: nn.Module) -> Iterator[Found]:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, _FusedMoE):
            decoder = re.match(r"(.*\.(\d+))\.", name)
            if decoder is not None:
                holder = modules[decoder[1]]
                yield Found(int(decoder[2]), name, module, holder, _shared.beside(_block(holder, module)))


def name_of(runner: Any) -> str:
    """The repository's or folder's name, as a profile has it."""
    path = str(runner.model_config.model_path)
    return Path(path).resolve().name if Path(path).exists() else path


def experts_of(experts: Any) -> int:
    """E, routed experts on all ranks together."""
    return int(experts.num_experts)


def top_k_of(experts: Any) -> int:
    """k, experts of a token."""
    return int(experts.top_k or experts.moe_runner_config.top_k or 0)


def is_draft(experts: Any) -> bool:
    """Whether they are a draft's, of speculative decoding; asked first while they are loaded."""
    # Experts do not say so before SGLang 0.5.23, but a draft is loaded in a scope of its own.
    if not hasattr(experts, "is_draft"):
        experts.is_draft = _flags().moe.in_speculative_scope
    return bool(experts.is_draft)


def group() -> Any:
    """The process group of the ranks that share the experts."""
    return _parallel().moe_ep_group.device_group


def rank() -> int:
    """This process's number among them."""
    return int(_parallel().moe_ep_rank)


def ranks() -> int:
    """R."""
    return int(_parallel().moe_ep_size)


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over the tensor-parallel ranks, by the way that stock takes."""
    summed: Tensor = _parallel().tp_group.all_reduce(tensor)
    return summed


def most_tokens() -> int:
    """Of the largest batch that the server takes."""
    schedule = _schedule()
    chunk = schedule.chunked_prefill_size
    return int(chunk if chunk and chunk > 0 else schedule.max_prefill_tokens)


def server_obstacle() -> str | None:
    """What of the server's arguments only stock serves; None: nothing."""
    at = _parallel()
    reasons = (
        (at.moe_ep_size < 2, "experts are on one rank: start the server with --tp and --ep of 2 or more"),
        (at.moe_ep_size != at.tp_size, f"--ep-size {at.moe_ep_size} is not --tp-size {at.tp_size}"),
        (at.attn_cp_size > 1, f"--attn-cp-size {at.attn_cp_size}"),
        (at.pp_size > 1, f"--pp-size {at.pp_size}"),
        (
            at.attn_dp_size > 1 and at.attn_dp_size != at.tp_size,
            f"attention is data-parallel over {at.attn_dp_size} ranks: expected --dp-size {at.tp_size}, or none",
        ),
        (
            not _a2a().is_none(),
            f"--moe-a2a-backend {_a2a().value} moves tokens itself: expected none (a plan's places go with it too: "
            "forerun moe show PLAN --sglang FILE, and --init-expert-location FILE without this section)",
        ),
        (_exec().moe.ep_num_redundant_experts > 0, "--ep-num-redundant-experts"),
        (_exec().overlap.enable_two_batch_overlap, "--enable-two-batch-overlap"),
        (bool(_lora().enable_lora or _lora().lora_paths), "LoRA adapters"),
        (
            _exec().moe.enable_eplb or _exec().moe.init_expert_location != "trivial",
            "--enable-eplb or --init-expert-location: either they or a plan say where experts lie",
        ),
        (
            _exec().moe.expert_distribution_recorder_mode is not None,
            "--expert-distribution-recorder-mode, which would see a part of the tokens: record without this section",
        ),
    )
    return next((reason for applies, reason in reasons if applies), None)


def obstacle(found: Found) -> str | None:
    """What of a layer only stock serves; None: nothing."""
    experts, boundary = found.experts, _boundary.boundary_of(found.decoder)
    config = experts.moe_runner_config
    if boundary is None:
        name = type(found.decoder).__name__
        return f"{name} does not hand its tokens over in the way of SGLang's other models{_UNSERVED.get(name, '')}"
    beside = _shared.misfit(_block(found.decoder, experts), experts, ranks())
    reasons = (
        (experts.num_fused_shared_experts > 0, "shared experts among the routed: --disable-shared-experts-fusion"),
        (config.apply_router_weight_on_input, "router weights on the experts' input"),
        (experts.quant_config is not None, f"{experts.quant_config and experts.quant_config.get_name()} quantization"),
        (beside is not None, beside),
    )
    return next((reason for applies, reason in reasons if applies), None) or _boundary.obstacle(boundary)


def _block(decoder: nn.Module, experts: nn.Module) -> nn.Module:
    return next(block for block in decoder.children() if experts in list(block.modules()))


def weights(experts: Any) -> list[list[Tensor]]:
    """Of each parameter of an expert, those of the E/R experts here, to be written in place."""
    held = [parameter.data for _, parameter in sorted(experts.named_parameters())]
    return [list(tensor) for tensor in held if tensor.ndim and len(tensor) == experts.num_local_experts]


def routing(rank_of: Callable[[str, Any, Container[str] | None], int | None]) -> list[Hook]:
    """Hooks by which each request goes to the data-parallel rank that it is given.

    But for those that are given none, and those whose sender, or a health check, says which rank answers.

    Args:
        rank_of: Is told a request's name, its token ids, and the names of those that wait for their answers, if known.
    """

    def name(request: Any, waiting: Container[str] | None) -> None:
        if request.routed_dp_rank is None and not _is_health_check(request) and request.input_ids:
            request.routed_dp_rank = rank_of(request.rid, request.input_ids, waiting)

    def made(request: Any, manager: Any, *_: Any, **__: Any) -> Any:
        if manager.elastic_worker_count > 1:
            name(request, manager.rid_to_state)
        return request

    def asked(stock: Callable[..., bool], controller: Any, request: Any) -> bool:
        name(request, None)
        return stock(controller, request)

    return [Hook(MADE, made, "after"), *([Hook(ROUTED, asked)] if _ASKS else [])]


def routed(answer: Any) -> tuple[Tensor, Tensor]:
    """`[n, k]` weights and `[n, k]` experts, below 0 for none, of a router's answer."""
    if not _topk.TopKOutputChecker.format_is_standard(answer):
        answer = answer.to_standard()
    return answer.topk_weights, answer.topk_ids


def placed(answer: Any, place: Tensor) -> Any:
    """A router's answer with each expert's place, `[E]`, for its number."""
    if not _topk.TopKOutputChecker.format_is_standard(answer):
        answer = answer.to_standard()
    ids = answer.topk_ids
    there = torch.where(ids < 0, ids, place[ids.clamp(min=0).long()].to(ids.dtype))
    return answer._replace(topk_ids=there)


def computed(experts: Any, rows: Tensor, number: Tensor) -> Tensor:
    """`[p, H]` rows, each answered by the expert of that number (`[p]`) among this rank's, by stock's own kernels."""
    if not len(rows):
        return rows
    weight = rows.new_ones(len(rows), 1, dtype=torch.float32)
    one = _topk.StandardTopKOutput(weight, number[:, None].to(torch.int32), rows.new_zeros(len(rows), 0))
    answer: Tensor = experts.run_moe_core(_standard.StandardDispatchOutput(rows, None, one)).hidden_states
    return answer


class _TopK(_topk.TopK):  # type: ignore[misc]
    """A router's choice that asks no kernel about no tokens, of which not all of SGLang's models take care."""

    def forward(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Any:
        if not len(hidden_states):
            return self.empty_topk_output(hidden_states.device)
        return super().forward(hidden_states, *rest, **named)


def attach(decoder: nn.Module, spread: Any) -> None:
    """Has a built layer ask a `Spread` about every batch: whether it is spread, and to do it."""
    boundary = _boundary.boundary_of(decoder)
    assert boundary is not None
    boundary.forerun_spread, boundary.__class__ = spread, _boundary.Stage
    for module in decoder.modules():
        if type(module) is _topk.TopK:
            module.__class__ = _TopK  # a rank may have no tokens of a batch


def experts_class(stock: type[nn.Module], forward: Callable[[Any, Callable[..., Any], Tensor, Any], Any]) -> type:
    """A class for built experts, whose forward pass is `forward(layer, stock's, hidden, answer of the router)`."""

    def instead(layer: Any, hidden_states: Tensor, topk_output: Any, *rest: Any, **named: Any) -> Any:
        def stocks(answer: Any) -> Any:
            return stock.forward(layer, hidden_states, answer, *rest, **named)

        return forward(layer, stocks, hidden_states, topk_output)

    return type(f"Speculative{stock.__name__}", (stock,), {"forward": instead})

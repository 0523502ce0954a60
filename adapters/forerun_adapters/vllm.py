"""vLLM, 0.28 to 0.32: the KV connector's classes, and what a connector reads from the engine, in one shape.

The contract tests of every symbol used here are in `tests/adapters/test_vllm.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from forerun_adapters._require import require

require("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1 import base as _base  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1 import metrics as _metrics  # noqa: E402

__all__ = [
    "Connector",
    "Metadata",
    "PromMetrics",
    "Scheduled",
    "Stats",
    "WorkerMetadata",
    "check_config",
    "fingerprint",
    "forget",
    "is_scheduler",
    "ordered",
    "packing",
    "parallel_rank",
    "parallel_size",
    "scheduled",
]

Connector: Any = _base.KVConnectorBase_V1
Metadata: Any = _base.KVConnectorMetadata
WorkerMetadata: Any = _base.KVConnectorWorkerMetadata
Stats: Any = _metrics.KVConnectorStats
PromMetrics: Any = _metrics.KVConnectorPromMetrics


class Scheduled(NamedTuple):
    """One request's part in a step."""

    request: str
    computed: int  # tokens that are computed or loaded before the step's own
    tokens: int  # that the step computes
    blocks: list[int]  # all of the request's, or the new ones
    is_new: bool  # whether `blocks` are all


def is_scheduler(role: Any) -> bool:
    """Whether a connector is the scheduler's half."""
    return bool(role == _base.KVConnectorRole.SCHEDULER)


def check_config(config: Any, cache: Any) -> None:
    """Returns if an engine can be part of a chain.

    Raises:
        ValueError: It cannot; the message says what to change.
    """
    if config.kv_transfer_config.kv_load_failure_policy != "recompute":
        raise ValueError(
            "kv_load_failure_policy is 'fail': a lost neighbour would end requests; "
            'expected "kv_load_failure_policy": "recompute" in --kv-transfer-config'
        )
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError("pipeline parallelism inside of an engine is not served: expected --pipeline-parallel-size 1")
    if len(cache.kv_cache_groups) != 1:
        raise ValueError(
            f"the model's cache has {len(cache.kv_cache_groups)} groups; expected one, of layers that attend alike"
        )


def parallel_size(config: Any) -> int:
    """Tensor-parallel ranks."""
    return int(config.parallel_config.tensor_parallel_size)


def parallel_rank(config: Any) -> int:
    """This worker's tensor-parallel rank."""
    return int(config.parallel_config.rank % parallel_size(config))


def fingerprint(config: Any) -> tuple[object, ...]:
    """What engines whose keys and values mean the same have in common, the cache's own shape aside."""
    model = config.model_config
    described = model.hf_config.to_dict()
    for changing in ("_name_or_path", "transformers_version"):
        described.pop(changing, None)
    return (
        sorted(described.items(), key=lambda item: item[0]),
        model.dtype,
        model.quantization,
        config.cache_config.cache_dtype,
        config.cache_config.block_size,
        config.parallel_config.tensor_parallel_size,
        parallel_rank(config),
    )


def packing(config: Any, names: Iterable[str]) -> list[str]:
    """How the layers of these names lay out a block: their backends, and the instruction sets that these pack for.

    Two CPUs may have blocks of one shape, and keys in another order within.
    """
    layers = [config.compilation_config.static_forward_context[name] for name in names]
    # The instruction set was the implementation's. Remove that when vllm >= 0.32.
    sets = [getattr(layer, "isa", None) or getattr(layer.impl, "isa", None) for layer in layers]
    return [f"{layer.get_attn_backend().get_name()} {isa}" for layer, isa in zip(layers, sets, strict=True)]


def ordered(caches: Mapping[str, Any]) -> list[str]:
    """Names of the layers that have a cache, first to last."""
    return sorted(caches, key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name))


def scheduled(output: Any) -> Iterator[Scheduled]:
    """All requests of a step."""
    for new in output.scheduled_new_reqs:
        tokens = output.num_scheduled_tokens[new.req_id]
        yield Scheduled(new.req_id, new.num_computed_tokens, tokens, list(new.block_ids[0]), True)
    cached = output.scheduled_cached_reqs
    for i, request in enumerate(cached.req_ids):
        blocks = list(cached.new_block_ids[i][0]) if cached.new_block_ids[i] is not None else []
        tokens = output.num_scheduled_tokens[request]
        yield Scheduled(request, cached.num_computed_tokens[i], tokens, blocks, request in cached.resumed_req_ids)


def forget(pool: Any, blocks: list[int]) -> None:
    """Takes blocks of a block pool out of the prefix cache: no later request finds them."""
    pool.evict_blocks(set(blocks))

"""`RunaheadConnector`: vLLM engines as a chain that shares a long prompt (KV-Runahead).

A KV connector, named in `--kv-transfer-config`:

    {"kv_connector": "RunaheadConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
     "kv_connector_extra_config": {"listen": "127.0.0.1:7001"}}

with the chain's secret in the environment variable FORERUN_RUNAHEAD_SECRET. vLLM finds it by its entry point; where
VLLM_PLUGINS leaves that out, `"kv_connector_module_path": "forerun.runahead.vllm"` is added. Every engine of a chain
gets the same prompt up to the end of its own context, at once, with `kv_transfer_params`

    {"runahead": {"chain": 32 hex digits, "start": tokens before its context, "end": its end, "next": "host:port"}}

the last engine the whole prompt and no `next`; it gives the answer. The others are asked for one token. `"prompt"`, the
digest of the tokens before `end`, is there where the engine makes its tokens itself: if they are others than those that
the chain is for, it computes alone. A request without these parameters is served as if the connector were not there.
What engines say to each other is authenticated by the secret, not encrypted; whom a request names as `next` learns
nothing without it.

Where vLLM calls it: the scheduler before it admits a request (`get_num_new_matched_tokens`), and every attention layer
between the write of its own keys and values and attention (`wait_for_layer_load`).

Served: models whose layers all have the same kind of cache, its first axis blocks; contexts that begin and end with
blocks (the last one ends anywhere), as no backend says where in a block a token's keys lie: on CPUs that is up to the
instruction set, and engines of unlike ones refuse each other. Tensor parallelism within an engine: each rank listens at
a port of its own. Not served: pipeline parallelism within an engine, caches in several groups (Mamba hybrids). Not run
on a GPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forerun.runahead.prefixes import digest
from forerun.runahead.relay import Relay
from forerun.runahead.stage import Over, Part, Stage, Stages, parse_stage
from forerun.runahead.transport import Peer, parse_address
from forerun.runahead.vllm_stats import ChainMetrics, ChainStats, Tally
from forerun.runahead.wire import SECRET, identity
from forerun_adapters import vllm as host

__all__ = ["RunaheadConnector"]

_OPTIONS = {"listen": "127.0.0.1:0", "transport": "auto", "timeout": 30.0, "capacity": 4 << 30, "identity": ""}
_POLL = 0.005  # seconds that an engine with nothing else to do waits for a chain at a time

_logger = logging.getLogger(__name__)


@dataclass
class _Orders(host.Metadata):  # type: ignore[misc]  # the host's class, which differs with its release
    """From the scheduler's half to the workers'."""

    parts: list[Part] = field(default_factory=list)
    finished: list[Over] = field(default_factory=list)
    idle: bool = False  # nothing to compute, and a request waits for its chain


@dataclass
class _News(host.WorkerMetadata):  # type: ignore[misc]
    """From the workers' half to the scheduler's."""

    reach: Mapping[bytes, int]
    broken: frozenset[bytes]
    failed: frozenset[bytes]

    def aggregate(self, other: _News) -> _News:
        """What holds for both workers."""
        reach = {chain: min(tokens, other.reach.get(chain, 0)) for chain, tokens in self.reach.items()}
        return _News(reach, self.broken | other.broken, self.failed | other.failed)


class RunaheadConnector(host.Connector):  # type: ignore[misc]
    """One engine's end of a chain; vLLM makes one for the scheduler and one for each worker.

    Options of `kv_connector_extra_config`:
        listen: Address for the engine before, by default "127.0.0.1:0" (any free port); tensor-parallel rank r adds r.
        transport: "auto", "tcp" or "local", as `forerun.runahead.transport.Sender`.
        timeout: Seconds that a request waits for its chain, and a layer for the engine before.
        capacity: Bytes that wait to be sent, or came and were not needed yet, at most.
        identity: Anything more that engines of a chain must have in common, such as the weights' revision.

    Raises:
        ValueError: An option is unknown or has no meaning, the secret is missing, or the engine is not served.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        host.check_config(vllm_config, kv_cache_config)
        given = vllm_config.kv_transfer_config.kv_connector_extra_config
        if unknown := set(given) - set(_OPTIONS):
            raise ValueError(f"kv_connector_extra_config has {sorted(unknown)}; there are {', '.join(_OPTIONS)}")
        self._options = {**_OPTIONS, **given}
        if self._options["transport"] not in ("auto", "tcp", "local"):
            raise ValueError(f"transport is {self._options['transport']!r}; expected auto, tcp or local")
        port, ranks = parse_address(self._options["listen"])[1], host.parallel_size(vllm_config)
        if ranks > 1 and not 0 < port <= 65536 - ranks:
            raise ValueError(
                f"listen is {self._options['listen']!r}: each of {ranks} tensor-parallel ranks listens at a "
                "port of its own, from that one on; expected a port that leaves room for them"
            )
        for name in ("timeout", "capacity"):
            value = self._options[name]
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r}; expected a number above 0")
        if not os.environ.get(SECRET):
            raise ValueError(f"{SECRET} is not set; expected a secret that the chain's engines alone know")
        self._config, self._cache_config = vllm_config, kv_cache_config
        self._block: int = vllm_config.cache_config.block_size
        self._stages = Stages(self._block, float(self._options["timeout"])) if host.is_scheduler(role) else None
        self._relay: Relay | None = None
        self._layers: dict[str, int] = {}
        self._pool: Any = None
        self._tallies = (Tally(), Tally())  # counts, and waits

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return True  # a replayed graph would skip the hooks

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # the next engine computes what does not come

    # The scheduler's half.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._stages is not None
        try:
            stage = parse_stage(request.kv_transfer_params, self._block)
        except ValueError as error:  # from a client: it must not end the engine
            if request.request_id not in self._stages:
                self._stages.refuse(request.request_id)
                _logger.warning("request %s is computed without a chain: %s", request.request_id, error)
            return 0, False
        if stage is None:
            return 0, False
        if request.request_id not in self._stages and not _is_prompt(stage, request.prompt_token_ids):
            _logger.warning("request %s is computed without a chain: it is for another prompt", request.request_id)
            self._stages.refuse(request.request_id, stage)
        return self._stages.matched(request.request_id, stage, request.num_tokens, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._stages is not None
        self._stages.place(request.request_id, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        assert self._stages is not None
        parts = [
            self._stages.part(step.request, step.computed, step.tokens, step.blocks, is_new=step.is_new)
            for step in host.scheduled(scheduler_output)
        ]
        idle = scheduler_output.total_num_scheduled_tokens == 0 and self._stages.waiting
        return _Orders([part for part in parts if part is not None], self._stages.take_finished(), idle)

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._stages is not None
        news = connector_output.kv_connector_worker_meta
        if news is not None and (untrue := self._stages.note(news.reach, news.broken, news.failed)):
            host.forget(self._pool, untrue)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        assert self._stages is not None
        self._stages.finish(request.request_id)
        return False, None

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._pool = gpu_block_pool

    # The workers' half.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Starts to listen.

        Raises:
            ValueError: A layer's cache is not laid out in blocks, or an address is none.
            OSError: The address is taken.
        """
        distinct = {caches.data_ptr(): name for name, caches in reversed(kv_caches.items())}  # layers may share one
        names = host.ordered({name: kv_caches[name] for name in distinct.values()})
        blocks = self._cache_config.num_blocks
        for name in names:
            if kv_caches[name].shape[0] != blocks:
                shape = list(kv_caches[name].shape)
                raise ValueError(f"the cache of {name} has shape {shape}; expected its {blocks} blocks to come first")
        rank, shapes = host.parallel_rank(self._config), [tuple(kv_caches[name].shape[1:]) for name in names]
        packing = host.packing(self._config, names)
        model = identity(*host.fingerprint(self._config), names, shapes, packing, self._options["identity"])
        timeout, capacity = float(self._options["timeout"]), int(self._options["capacity"])
        peer = Peer(os.environ[SECRET].encode(), model, timeout=timeout, capacity=capacity)
        address = parse_address(self._options["listen"])
        listen = (address[0], address[1] and address[1] + rank)
        caches = [kv_caches[name] for name in names]
        self._relay = Relay(caches, self._block, peer, listen, self._options["transport"], timeout, rank)
        self._layers = {name: index for index, name in enumerate(names)}
        _logger.info("runahead: listening on %s:%d", *self._relay.address)

    @property
    def address(self) -> tuple[str, int]:
        """Where a worker's half listens."""
        assert self._relay is not None
        return self._relay.address

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._relay is not None:
            self._relay.begin(connector_metadata.parts, connector_metadata.finished)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: layers come one by one."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._relay is not None and (index := self._layers.get(layer_name)) is not None:
            self._relay.layer(index)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: a layer was sent before its attention."""

    def wait_for_save(self) -> None:
        if self._relay is not None and self._get_connector_metadata().idle:
            self._relay.receiver.mailbox.wait(_POLL)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._relay.take_failed_blocks() if self._relay is not None else set()

    def build_connector_worker_meta(self) -> Any:
        if self._relay is None:
            return None
        mailbox = self._relay.receiver.mailbox
        return _News(mailbox.reach(), mailbox.broken, self._relay.take_failed())

    def shutdown(self) -> None:
        if self._relay is not None:
            self._relay.close()
            self._relay = None

    # Metrics.

    def get_kv_connector_stats(self) -> Any:
        counted: dict[str, float] = {}
        waits: dict[str, float] = {}
        shares: list[float] = []
        if self._relay is not None:
            counted = {**self._relay.counted, "refused": sum(self._relay.receiver.refused.values())}
            waits = dict(self._relay.waits)
            shares = [self._relay.shares.popleft() for _ in range(len(self._relay.shares))]
        if self._stages is not None:
            counted["recomputes"] = self._stages.given_up + self._stages.failed
        stats = ChainStats.of(self._tallies[0].added(counted), self._tallies[1].added(waits), shares)
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        return ChainStats(data=data) if data is not None else ChainStats.of({}, {}, [])

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> Any:
        return ChainMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _is_prompt(stage: Stage, tokens: Sequence[int] | None) -> bool:
    return stage.prompt is None or (tokens is not None and digest(tokens[: stage.end]) == stage.prompt)

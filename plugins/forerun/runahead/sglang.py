"""KV-Runahead inside one SGLang server: ranks that share a long prompt, in place of zigzag context parallelism.

Turned on by the section `"runahead"` of the configuration that FORERUN_SGLANG names, for a server with
`--tp-size R --attn-cp-size R --enable-prefill-cp --cp-strategy zigzag`:

    {"runahead": {"split": [0.55, 0.45]}}

or `{"runahead": {"table": "table.json"}}` as `forerun runahead tune` writes it, or `{"runahead": {}}`: the split is
searched by a model of the chain that is fitted at start-up.

Every rank holds the whole model. In prefill, rank i computes the rows of its own context and nothing else, its length
is its own, and no other rank waits for it but through keys and values: of each layer it gets those of all earlier
tokens, sends them on with its own at once, and attends. The last rank's final rows go to all, which so give the same
first token; then each rank sends its own keys and values to the ranks before it, and only the next forward pass waits
for that. Decode and passes that are not split run on every rank alike, without a word between them.

Where SGLang calls it: `init_cp_strategy`, once a process; `ModelRunner.load_model` and `forward`, which are run in a
scope where the model sees one rank; attention, through the strategy's methods, or in the case of `torch_native` through
a hook. Not served, and refused: what `check_server` and `check_runner` of `forerun_adapters.sglang_cp` name. On GPUs
the backends fa3 and fa4 call a strategy the same way; that was not run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import torch

from forerun.runahead.batch import Batch
from forerun.runahead.handover import Handover, Kind
from forerun.runahead.lowest import attend_last
from forerun.runahead.settings import Settings, read
from forerun.runahead.shares import Chooser, split_pass
from forerun_adapters import sglang_cp as host
from forerun_adapters.sglang import RELEASE, Hook

__all__ = ["RunaheadStrategy", "hooks"]

_BACKENDS = ("torch_native", "fa3", "fa4")

_logger = logging.getLogger(__name__)


def hooks(section: Mapping[str, Any]) -> Sequence[Hook]:
    """What SGLang's processes need; called by `forerun_adapters.sglang_plugin`.

    Raises:
        OSError: The table cannot be read.
        ValueError: The section has no meaning.
    """
    settings = read(section)

    def choose(split: bool, ranks: int) -> None:
        if not split or ranks < 2:
            raise ValueError(
                "KV-Runahead was asked for, but prefill context parallelism is off: "
                "add --enable-prefill-cp --cp-strategy zigzag --attn-cp-size R with R = --tp-size, or more ranks"
            )
        settings.check(ranks)
        host.install(RunaheadStrategy(ranks, settings))

    return (
        host.choosing(choose),
        Hook(host.LOAD, _load),
        Hook(host.FORWARD, _forward),
        Hook(host.ATTENTION, _attend),
        Hook(host.STATE, _tell, "after"),
    )


@dataclass
class _Contexts(host.Metadata):  # type: ignore[misc]  # the host's class
    """One split pass; SGLang keeps it in the forward batch."""

    split: Batch | None = None
    rows: tuple[torch.Tensor, ...] = ()  # [R] of each rank, counted in the pass' order
    order: torch.Tensor | None = None  # rows of the ranks up to this one, as keys and values come
    ends: torch.Tensor | None = None  # [B + 1] where each sequence's own queries end
    seen: torch.Tensor | None = None  # [B] keys that they attend to
    # SGLang's own names. It makes the first one that of the longest context; nothing here is as long.
    per_rank_actual_token: list[int] | None = None
    per_rank_logical_token: list[int] | None = None
    max_rank_len: list[int] | None = None


class RunaheadStrategy(host.Strategy):  # type: ignore[misc]
    """A chain of ranks as a context-parallel strategy of SGLang.

    Args:
        cp_size: R.
        settings: As `forerun.runahead.settings.read` gives them.
    """

    name = "kv_runahead"
    kind = host.ZIGZAG  # of SGLang's kinds that which holds sequences whole

    def __init__(self, cp_size: int, settings: Settings) -> None:
        super().__init__(cp_size)
        self._settings = settings
        self._joined: _Joined | None = None

    @property
    def cp_rank(self) -> int:
        """This process' rank in the chain."""
        return self._own.handover.rank

    @property
    def _own(self) -> _Joined:
        if self._joined is None:
            raise RuntimeError("the chain's ranks are not joined yet")
        return self._joined

    def join(self, runner: Any) -> None:
        """Ties this process to the other ranks, before its model is loaded; all of them call this.

        Raises:
            ValueError: The server runs in a way that is not served.
        """
        host.check_server(self.cp_size)
        chain, back = host.groups(2, self._settings.timeout)
        handover = Handover(chain, back, self._settings.timeout)
        model = runner.model_config
        chooser = self._settings.chooser(self.cp_size, model.hf_config.to_dict(), runner.device, model.dtype, chain)
        self._joined = _Joined(runner, handover, chooser)
        _logger.info("KV-Runahead: rank %d of %d, sglang %s, %s", handover.rank, self.cp_size, RELEASE, chooser)

    def settle(self) -> None:
        """Writes what came since the last pass into the cache; waits for the rest of it."""
        own = self._own
        for late in own.handover.settle():
            host.write(own.pool, own.layers[late.layer], own.slots[own.rows[late.rank]], late.key, late.value)
        own.layers = []

    def finish(self) -> None:
        """Lets each rank's keys and values go to the ranks before it, if the pass was split."""
        if self._own.layers:
            self._own.handover.give_back()

    def state(self) -> dict[str, Any]:
        """SGLang's release; what this rank has moved, in bytes; each rank's rows in the last pass that was split."""
        handover = self._own.handover
        return {
            "sglang": str(RELEASE),
            "rank": handover.rank,
            "ranks": handover.size,
            **asdict(handover.moved),
            "rows": list(handover.rows),
        }

    def can_apply(self, num_tokens: int, forward_batch: Any) -> bool:
        """Whether the pass is split."""
        if not host.is_prefill(forward_batch):
            return False
        lengths = list(forward_batch.extend_seq_lens_cpu or ())
        cached = list(forward_batch.extend_prefix_lens_cpu or [0] * len(lengths))
        return sum(lengths) == num_tokens and split_pass(self._own.chooser, lengths, cached) is not None

    def build_metadata(
        self, num_tokens: int, seqs_len: list[int] | None, extend_seqs_len: list[int] | None = None
    ) -> _Contexts:
        """Splits a pass that `can_apply` to, and opens it: receives are posted."""
        own, rank = self._own, self.cp_rank
        lengths = extend_seqs_len or seqs_len or [num_tokens]
        cached = [total - n for total, n in zip(seqs_len or lengths, lengths, strict=True)]
        split = split_pass(own.chooser, lengths, cached)
        if split is None:
            raise RuntimeError(f"a pass over {lengths} tokens is not split")
        device, pool = own.runner.device, own.pool
        key, value = (buffer(pool.start_layer) for buffer in (pool.get_key_buffer, pool.get_value_buffer))
        kind = Kind(tuple(key.shape[1:]), tuple(value.shape[1:]), key.dtype, key.device)
        own.handover.begin(split.totals, pool.layer_num, kind)
        own.rows = tuple(torch.tensor(split.rows(i), device=device) for i in range(split.ranks))
        queries, keys = split.queries(rank), split.keys(rank)
        return _Contexts(
            total_seq_lens=num_tokens,
            bs=len(lengths),
            split=split,
            rows=own.rows,
            order=torch.tensor(split.order(rank + 1), device=device),
            ends=torch.tensor(list(accumulate(queries, initial=0)), dtype=torch.int32, device=device),
            seen=torch.tensor(keys, dtype=torch.int32, device=device),
            per_rank_actual_token=list(split.totals),
        )

    def shard_hidden_states(self, x: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        """This rank's rows of `[S, ...]`: as many as its context has tokens."""
        return x[forward_batch.attn_cp_metadata.rows[self.cp_rank]]

    def shard_position_ids(self, positions: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        """This rank's rows of `[..., S]`."""
        return positions[..., forward_batch.attn_cp_metadata.rows[self.cp_rank]]

    def gather_hidden_states(self, x: torch.Tensor, forward_batch: Any, stream: Any = None) -> torch.Tensor:
        """`[S, ...]` with the rows that SGLang reads after the pass: of each sequence's last token, or all if asked."""
        contexts, handover = forward_batch.attn_cp_metadata, self._own.handover
        split: Batch = contexts.split
        full = x.new_zeros(sum(split.totals), *x.shape[1:])
        if forward_batch.return_logprob or _captures(forward_batch):
            for rows, part in zip(contexts.rows, handover.gather(x, split.totals), strict=True):
                full[rows] = part
            return full
        lasts = torch.tensor(split.lasts(), device=x.device)
        if self.cp_rank == self.cp_size - 1:
            ends = torch.tensor(list(accumulate(split.queries(self.cp_rank))), device=x.device) - 1
            given = x[ends]
        else:
            given = x.new_empty(len(lasts), *x.shape[1:])
        full[lasts] = handover.last(given)
        return full

    def gather_kv_cache(self, x: torch.Tensor, forward_batch: Any, stream: Any = None) -> torch.Tensor:
        """Not called: keys and values are handed on."""
        raise NotImplementedError("KV-Runahead gathers no keys and values")

    def materialize_full_kv(
        self,
        forward_batch: Any,
        layer: Any = None,
        k: Any = None,
        v: Any = None,
        swa_loc: Any = None,
    ) -> None:
        """One layer's keys and values of all tokens up to this rank's: into the cache, and on to the next rank."""
        own = self._own
        if not own.layers:
            own.slots = forward_batch.out_cache_loc
        own.layers.append(layer)
        key = k.reshape(-1, layer.tp_k_head_num, layer.qk_head_dim)
        value = v.reshape(-1, layer.tp_v_head_num, layer.v_head_dim)
        keys, values = own.handover.exchange(key, value)
        host.write(own.pool, layer, own.slots[forward_batch.attn_cp_metadata.order], keys, values)

    def materialize_full_mla_kv(self, forward_batch: Any, layer: Any, k_nope: Any, k_rope: Any) -> None:
        """Not called: such models are refused."""
        raise NotImplementedError("KV-Runahead does not serve latent attention")

    def run_attention(
        self, q: torch.Tensor, forward_batch: Any, device: Any, attn_fn: Any, attention_backend: Any = None
    ) -> torch.Tensor:
        """This rank's queries, each sequence's attending to all of its tokens up to them."""
        contexts = forward_batch.attn_cp_metadata
        longest = max(contexts.split.queries(self.cp_rank))
        attended: torch.Tensor = attn_fn(q, contexts.ends, contexts.seen, longest)
        return attended


@dataclass
class _Joined:
    """What a strategy has once its ranks know each other."""

    runner: Any
    handover: Handover
    chooser: Chooser
    # Of the pass that goes on, or whose keys and values still travel; `build_metadata` and the first layer set them.
    layers: list[Any] = field(default_factory=list)
    slots: Any = None
    rows: tuple[torch.Tensor, ...] = ()

    @property
    def pool(self) -> Any:
        return self.runner.token_to_kv_pool


def _captures(forward_batch: Any) -> bool:
    mode = forward_batch.capture_hidden_mode
    return mode is not None and bool(mode.need_capture())


def _load(original: Any, runner: Any) -> Any:
    strategy = host.installed()
    strategy.join(runner)
    with host.on_one_rank():
        loaded = original(runner)
    host.check_runner(runner, _BACKENDS)
    return loaded


def _forward(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    strategy = host.installed()
    strategy.settle()
    with host.on_one_rank():
        output = original(runner, *args, **kwargs)
    strategy.finish()
    return output


def _attend(
    original: Any, backend: Any, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *rest: Any, **options: Any
) -> Any:
    if not isinstance(forward_batch.attn_cp_metadata, _Contexts):
        return original(backend, q, k, v, layer, forward_batch, *rest, **options)
    return host.attend(backend, host.installed(), attend_last, q, k, v, layer, forward_batch)


def _tell(result: Any, *_: Any) -> Any:
    result.internal_state.setdefault("forerun", {})["runahead"] = host.installed().state()
    return result

"""Contracts with SGLang: what forerun's context parallelism stands on is there and takes what it is given."""

import dataclasses
import inspect
import os
import pkgutil
import types
import warnings

import pytest
import torch
from packaging.version import Version

pytest.importorskip("sglang")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang's own, of kernels that a CPU lacks
    import sglang.srt.managers.scheduler  # noqa: F401

from sglang.srt import runtime_context as context
from sglang.srt.distributed import parallel_state
from sglang.srt.distributed.parallel_state import patch_tensor_parallel_group
from sglang.srt.environ import envs
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.cp import base
from sglang.srt.layers.cp.zigzag import ZigzagCPStrategy
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.runner.eager_runner import EagerRunner
from sglang.srt.runtime_context import get_parallel

from forerun.runahead.settings import Settings
from forerun.runahead.sglang import RunaheadStrategy
from forerun_adapters import sglang_cp as host
from forerun_adapters._require import HOSTS

# That the scope of one rank may say otherwise.
FIELDS = getattr(context, "_PARALLEL_FIELDS", None) or context._parallel_fields()


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    "target, takes",
    [
        (host.STRATEGY, ["server_args"] if host._BEFORE_19 else ["enable_prefill_cp", "cp_size", "cp_strategy"]),
        (host.LOAD, ["self"]),
        (host.FORWARD, ["self", "forward_batch"]),
        (host.ATTENTION, ["self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"]),
        (host.STATE, ["self", "recv_req"]),
    ],
)
def test_what_is_hooked(target, takes):
    assert parameters(pkgutil.resolve_name(target))[: len(takes)] == takes


@pytest.mark.parametrize("patch", [19, 20, 21])
def test_the_oldest_release_still_needs_its_shims(patch):
    """Once 0.5.21 is the oldest release that is supported, what `_BEFORE_21` asks for can go, and so on."""
    assert HOSTS["sglang"].supports(Version(f"0.5.{patch - 1}")) and hasattr(host, f"_BEFORE_{patch}")


def test_a_strategy_is_chosen_as_sglang_asks(monkeypatch):
    """The variable without which strategies split nothing before 0.5.20 is set for whoever starts next."""
    monkeypatch.setenv("SGLANG_ENABLE_CP_V2", "0")
    asked, found = {"enable_prefill_cp": True, "cp_size": 2, "cp_strategy": "zigzag"}, []
    hook = host.choosing(lambda *given: found.append(given))
    if host._BEFORE_19:
        arguments = {**asked, "attn_cp_size": 2}
        hook.function(None, types.SimpleNamespace(**arguments))
    else:
        hook.function(None, **asked)
    assert hook.target == host.STRATEGY and found == [(True, 2)]
    assert (os.environ["SGLANG_ENABLE_CP_V2"] == "True") == host._BEFORE_20
    assert hasattr(envs, "SGLANG_ENABLE_CP_V2") == host._BEFORE_20


def test_a_strategy_has_what_sglang_calls():
    assert not RunaheadStrategy.__abstractmethods__
    for name in ("build_metadata", "shard_hidden_states", "shard_position_ids", "gather_hidden_states"):
        assert parameters(getattr(RunaheadStrategy, name)) == parameters(getattr(base.ContextParallelStrategy, name))
    for name in ("materialize_full_kv", "run_attention"):
        assert parameters(getattr(RunaheadStrategy, name)) == parameters(getattr(ZigzagCPStrategy, name))


def test_a_strategy_is_installed_and_found():
    before = base._STRATEGY
    strategy = RunaheadStrategy(2, Settings(split=(0.5, 0.5)))
    try:
        host.install(strategy)
        assert host.installed() is strategy
        assert base.get_cp_strategy_kind() == base.ContextParallelStrategyKind.ZIGZAG
    finally:
        host.install(before)


def test_the_scope_of_one_rank():
    names = {f"{kind}_{what}" for kind in ("attn_tp", "attn_cp", "moe_dp") for what in ("group", "size", "rank")}
    assert names <= FIELDS and callable(get_parallel().override)
    assert ("owns_attention" in parameters(patch_tensor_parallel_group)) != host._BEFORE_21
    assert ("enable_prefill_cp" in FIELDS) != host._BEFORE_21
    assert ("enable_cp_tp_group_sharing" in FIELDS) == host._SINCE_22
    assert parallel_state._MOE_DP is None  # of a process without ranks


def test_what_is_read_of_a_pass():
    fields = {field.name for field in dataclasses.fields(ForwardBatch)}
    assert fields >= {
        "forward_mode",
        "extend_seq_lens_cpu",
        "extend_prefix_lens_cpu",
        "attn_cp_metadata",
        "out_cache_loc",
        "req_pool_indices",
        "return_logprob",
        "capture_hidden_mode",
    }
    assert ForwardMode.EXTEND.is_context_parallel_extend() and not ForwardMode.DECODE.is_context_parallel_extend()
    split = EagerRunner._execute_extend_cp_v2 if host._BEFORE_20 else EagerRunner._execute_extend_cp
    assert "cp_gather_after_forward" in inspect.getsource(split)


def test_what_is_read_of_a_layer():
    layer = RadixAttention(4, 32, 0.5, num_kv_heads=2, layer_id=1)
    assert (layer.tp_q_head_num, layer.tp_k_head_num, layer.tp_v_head_num) == (4, 2, 2)
    assert (layer.qk_head_dim, layer.v_head_dim, layer.scaling, layer.layer_id) == (32, 32, 0.5, 1)
    assert (layer.k_scale, layer.v_scale, layer.sliding_window_size, layer.logit_cap) == (None, None, -1, 0.0)


def test_the_cache_is_written_by_slot():
    fields = {field.name for field in dataclasses.fields(KVWriteLoc)}
    assert "loc" in fields and ("physical" in fields) == host._SINCE_22
    assert parameters(MHATokenToKVPool.set_kv_buffer)[:7] == [
        "self", "layer", "loc_info", "cache_k", "cache_v", "k_scale", "v_scale",
    ]  # fmt: skip
    assert {"token_to_kv_pool", "req_to_token_pool"} <= set(
        inspect.getsource(TorchNativeAttnBackend.__init__).replace(".", " ").split()
    )


class Recording:
    """A strategy that keeps what it is given, and asks for all queries over all keys."""

    def materialize_full_kv(self, batch, layer, key, value):
        self.given = (key, value)

    def run_attention(self, query, batch, device, run):
        ends, seen = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, 2, 5], [4, 3]))
        return run(query, ends, seen, 3)


def test_torch_native_attends_as_a_strategy_says():
    """Two sequences, of 2 queries over 4 keys and 3 over 3, read from the cache by slot."""
    draw = torch.Generator().manual_seed(0)
    layer = RadixAttention(2, 8, 0.25, num_kv_heads=1, layer_id=0)
    cache = [torch.randn(9, 1, 8, generator=draw) for _ in range(2)]

    class Backend:
        class token_to_kv_pool:
            get_key_buffer = staticmethod(lambda layer: cache[0])
            get_value_buffer = staticmethod(lambda layer: cache[1])

        class req_to_token_pool:
            req_to_token = torch.tensor([[0, 0, 0, 0], [8, 1, 3, 0], [2, 4, 6, 7]])

    class Pass:
        req_pool_indices = torch.tensor([2, 1])

    asked = []

    def attention(query, key, value, *, scale):
        asked.append((len(query), key, value, scale))
        return query + 1

    query, strategy = torch.randn(5, 16, generator=draw), Recording()
    found = host.attend(Backend, strategy, attention, query, query, query, layer, Pass)
    assert torch.equal(found, query + 1)
    assert strategy.given[0] is query
    for (rows, key, value, scale), slots, count in zip(asked, ([2, 4, 6, 7], [8, 1, 3]), (2, 3), strict=True):
        assert rows == count and scale == 0.25
        assert torch.equal(key, cache[0][slots]) and torch.equal(value, cache[1][slots])

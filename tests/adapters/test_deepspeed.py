"""What forerun's DeepSpeed adapters stand on: the symbols of both kinds of layers and of engines, as installed."""

import inspect
import os
from importlib import metadata

import pytest

pytest.importorskip("deepspeed")

import deepspeed
import torch
from deepspeed.module_inject import auto_ep_layer
from deepspeed.moe import sharded_moe
from deepspeed.moe.ep_experts import GroupedExperts
from deepspeed.runtime.engine import DeepSpeedEngine
from packaging.version import Version

from forerun_adapters import deepspeed_autoep, deepspeed_engine
from forerun_adapters._require import HOSTS


@pytest.mark.parametrize(
    ("symbol", "parameters"),
    [
        (auto_ep_layer.AutoEPMoELayer.forward, ["self", "hidden_states"]),
        (auto_ep_layer.permute_by_local_expert, ["tokens", "local_counts"]),
        (auto_ep_layer.unpermute_by_local_expert, ["expert_output", "permuted_indices", "n_tokens"]),
        (
            auto_ep_layer.combine_from_routed,
            ["expert_output", "top_scores", "token_indices_sorted", "top_k", "score_apply", "combine_impl", "shape"],
        ),
        (sharded_moe.MOELayer.forward, ["self", "input", "kwargs"]),
        (sharded_moe.TopKGate.forward, ["self", "input", "used_token", "sparse_routes", "use_tutel"]),
        (sharded_moe._sparse_decode, ["expert_output", "slots", "gates", "num_tokens"]),
        (deepspeed.init_inference, ["model", "config", "kwargs"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_functions_take_what_they_are_given(symbol, parameters):
    assert list(inspect.signature(symbol).parameters) == parameters


def test_a_gate_answers_in_this_order():
    gate = sharded_moe.TopKGate(4, 3, k=2, drop_tokens=False, top2_2nd_expert_sampling=False)
    loss, capacity, experts, expert, _, weight, counts = gate(torch.randn(5, 4), None, True, False)
    assert loss.ndim == 0
    assert int(capacity) == int(counts.max())
    assert experts == 3
    assert expert.shape == weight.shape == (2, 5)
    assert counts.sum() == 10


def test_engines_have_what_is_wrapped():
    assert all(callable(getattr(DeepSpeedEngine, name)) for name in deepspeed_engine.CHECKPOINTS)
    assert {"args", "model", "config", "config_params"} <= set(inspect.signature(deepspeed.initialize).parameters)


def test_the_oldest_release_still_needs_its_shims():
    """Once `comm_backend` and `_finalize_output` are in every release that is supported, their shims can go."""
    oldest = min(Version(spec.version) for spec in HOSTS["deepspeed"].supported if spec.operator == ">=")
    assert oldest < Version("0.19.7")


def test_this_is_the_release_that_was_asked_for():
    assert metadata.version("deepspeed") == os.environ.get("FORERUN_DEEPSPEED", "0.19.8")  # `make test-deepspeed`


def test_the_router_answers_in_this_order():
    assert auto_ep_layer.RouterOutput._fields == ("top_scores", "selected_experts", "num_tokens_per_expert")


@pytest.mark.parametrize(
    "attribute",
    [
        "ep_group",
        "ep_size",
        "folding_group_handles",
        "score_apply",
        "combine_impl",
        "num_experts",
        "num_local_experts",
        "top_k",
        "expert_bias",
        "tokens_per_expert",
    ],
)
def test_the_layer_has_what_is_read(attribute):
    source = inspect.getsource(auto_ep_layer.AutoEPMoELayer.__init__)
    assert f"self.{attribute} = " in source or f'"{attribute}"' in source


@pytest.mark.parametrize("seed", range(6))
def test_experts_are_given_what_stock_gives_them(seed):
    """Whatever came from whom, none to an expert and none at all included: bit for bit."""
    torch.manual_seed(seed)
    layer = torch.nn.Module()
    layer.experts = GroupedExperts(dim=24, hidden_dim=16, num_experts=3, use_grouped_mm=False)
    given = []
    layer.experts.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter)
    pairs = torch.randint(0, 9, (4, 3)) * torch.randint(0, 2, (4, 3)) * (seed > 0)
    rows = torch.randn(int(pairs.sum()), 24)
    with torch.no_grad():
        ours = deepspeed_autoep.computed(layer, rows, pairs)
        permuted, indices, aligned, count = auto_ep_layer.permute_by_local_expert(rows, pairs)
        stock = auto_ep_layer.unpermute_by_local_expert(layer.experts(permuted, aligned), indices, count)
    assert torch.equal(ours, stock)
    assert torch.equal(given[0][1], given[1][1].long())
    assert torch.equal(given[0][0], given[1][0][: len(given[0][0])])

"""What `forerun_adapters.deepspeed` stands on: the symbols of AutoEP's layer, as they are in the installed release."""

import inspect

import pytest

pytest.importorskip("deepspeed")

import torch
from deepspeed.module_inject import auto_ep_comm, auto_ep_layer
from deepspeed.moe.ep_experts import GroupedExperts

from forerun_adapters import deepspeed as host


@pytest.mark.parametrize(
    ("symbol", "parameters"),
    [
        (auto_ep_layer.AutoEPMoELayer._forward, ["self", "hidden_states"]),
        (auto_ep_layer.AutoEPMoELayer._finalize_output, ["self", "output", "x", "hidden_states", "hdim"]),
        (auto_ep_layer.permute_by_local_expert, ["tokens", "local_counts"]),
        (auto_ep_layer.unpermute_by_local_expert, ["expert_output", "permuted_indices", "n_tokens"]),
        (
            auto_ep_layer.combine_from_routed,
            ["expert_output", "top_scores", "token_indices_sorted", "top_k", "score_apply", "combine_impl", "shape"],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_functions_take_what_they_are_given(symbol, parameters):
    assert list(inspect.signature(symbol).parameters) == parameters


def test_the_router_answers_in_this_order():
    assert auto_ep_layer.RouterOutput._fields == ("top_scores", "selected_experts", "num_tokens_per_expert")
    assert auto_ep_comm.COMM_BACKEND == "comm"


@pytest.mark.parametrize(
    "attribute",
    [
        "ep_group",
        "ep_size",
        "comm_backend",
        "folding_group_handles",
        "async_split_plan",
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
        ours = host.computed(layer, rows, pairs)
        permuted, indices, aligned, count = auto_ep_layer.permute_by_local_expert(rows, pairs)
        stock = auto_ep_layer.unpermute_by_local_expert(layer.experts(permuted, aligned), indices, count)
    assert torch.equal(ours, stock)
    assert torch.equal(given[0][1], given[1][1].long())
    assert torch.equal(given[0][0], given[1][0][: len(given[0][0])])

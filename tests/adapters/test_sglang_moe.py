"""What of SGLang the expert-parallel adapter stands on: names, signatures, fields."""

import inspect
import pkgutil
import warnings

import pytest
from packaging.version import Version

pytest.importorskip("sglang")

with warnings.catch_warnings():  # quantizations that this machine lacks
    warnings.simplefilter("ignore")
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput, TopK
    from sglang.srt.managers import data_parallel_controller
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.runtime_context import get_flags

    from forerun_adapters import sglang_moe as host
    from forerun_adapters._require import HOSTS


def names(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("target", "parameters"),
    [
        (host.LOADED, ["self"]),
        (host.LOCAL, ["self", "expert_id"]),
        (host.STATE, ["self", "recv_req"]),
        (host.MADE, ["self", "obj", "input_text", "input_ids"]),
        (host.ROUTED, ["self", "req"]),
    ],
)
def test_hooked_functions_are_what_they_were(target, parameters):
    assert names(pkgutil.resolve_name(target))[: len(parameters)] == parameters


def test_experts_are_asked_by_a_routers_answer():
    assert names(FusedMoE.forward)[:3] == ["self", "hidden_states", "topk_output"]
    assert names(FusedMoE.run_moe_core) == ["self", "dispatch_output"]
    assert StandardTopKOutput._fields == ("topk_weights", "topk_ids", "router_logits")
    assert StandardDispatchOutput._fields[:3] == ("hidden_states", "hidden_states_scale", "topk_output")


def test_a_router_has_an_answer_for_no_tokens():
    assert names(TopK.empty_topk_output)[:2] == ["self", "device"]
    assert names(TopK.forward_native)[:3] == ["self", "hidden_states", "router_logits"]


def test_experts_of_a_draft_are_known():
    """Before 0.5.23 by the scope that they are loaded in; once that is the oldest release, they say so themselves."""
    assert get_flags().moe.in_speculative_scope is False
    assert HOSTS["sglang"].supports(Version("0.5.22"))


def test_the_oldest_release_still_needs_a_communicator():
    """Once 0.5.21 is the oldest release that is supported, `sglang_communicator` and its tests can go."""
    assert HOSTS["sglang"].supports(Version("0.5.20"))


def test_who_makes_requests_knows_the_ranks_and_which_requests_wait():
    source = inspect.getsource(TokenizerManager)
    assert "self.elastic_worker_count = " in source
    assert "self.rid_to_state: Dict[str, ReqState] = {}" in source


def test_who_asks_for_a_requests_rank_has_plugins():
    """From 0.5.22 on; once that is the oldest release that is supported, what depends on `_ASKS` can go."""
    assert hasattr(data_parallel_controller, "load_plugins") == host._ASKS
    assert HOSTS["sglang"].supports(Version("0.5.21"))

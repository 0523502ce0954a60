"""What of SGLang the expert-parallel adapter stands on: names, signatures, fields."""

import inspect
import pkgutil
import warnings

import pytest

pytest.importorskip("sglang")

with warnings.catch_warnings():  # quantizations that this machine lacks
    warnings.simplefilter("ignore")
    from sglang.srt.layers.layer_boundary.residual import add_norm
    from sglang.srt.layers.layer_boundary.residual.stream import Contribution, DeclaredSum, ResidualStream
    from sglang.srt.layers.layer_boundary.stage import StageBoundary
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from forerun_adapters import sglang_moe as host


def names(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("target", "parameters"),
    [
        (host.LOADED, ["self"]),
        (host.LOCAL, ["self", "expert_id"]),
        (host.STATE, ["self", "recv_req"]),
        (host.ROUTED, ["self", "req"]),
    ],
)
def test_hooked_functions_are_what_they_were(target, parameters):
    assert names(pkgutil.resolve_name(target)) == parameters


def test_a_stage_prepares_and_finishes():
    assert names(StageBoundary.prepare)[:3] == ["self", "hidden_states", "forward_batch"]
    assert names(StageBoundary.finish)[:3] == ["self", "hidden_states", "forward_batch"]
    assert names(StageBoundary.exit)[:2] == ["self", "forward_batch"]
    assert "__slots__" not in vars(StageBoundary)  # its class can be changed
    assert issubclass(host.Stage, StageBoundary)


def test_a_stream_hands_a_part_of_a_sum_over():
    assert names(ResidualStream.input) == ["self", "hidden"]
    assert names(ResidualStream.write) == ["self", "residual"]
    assert names(ResidualStream.record)[:3] == ["self", "output", "update"]
    assert {"value", "update", "owed"} <= set(Contribution.__struct_fields__)
    assert "complete_sum" in DeclaredSum.__struct_fields__
    assert names(add_norm.NORM_READOUT.update_and_read)[:4] == ["update", "hidden_states", "residual", "norm"]
    assert add_norm.PLAIN_ADD.is_plain_add


def test_experts_are_asked_by_a_routers_answer():
    assert names(FusedMoE.forward)[:3] == ["self", "hidden_states", "topk_output"]
    assert names(FusedMoE.run_moe_core) == ["self", "dispatch_output"]
    assert StandardTopKOutput._fields == ("topk_weights", "topk_ids", "router_logits")
    assert StandardDispatchOutput._fields[:3] == ("hidden_states", "hidden_states_scale", "topk_output")

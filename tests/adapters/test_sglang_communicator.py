"""What of SGLang's communicators, which it has before 0.5.21, the expert-parallel adapter stands on."""

import inspect
import warnings

import pytest
from packaging.version import Version

pytest.importorskip("sglang")

from forerun_adapters.sglang import RELEASE

if Version("0.5.21") <= RELEASE:
    pytest.skip("a release with stages", allow_module_level=True)

with warnings.catch_warnings():  # quantizations that this machine lacks
    warnings.simplefilter("ignore")
    from sglang.srt.layers.communicator import LayerCommunicator, LayerScatterModes, ScatterMode
    from sglang.srt.models.qwen3_moe import Qwen3MoeDecoderLayer
    from sglang.srt.runtime_context import get_forward

    from forerun_adapters import sglang_communicator as host


def names(function):
    return list(inspect.signature(function).parameters)


def test_a_communicator_prepares_and_hands_over():
    batch = ["self", "hidden_states", "residual", "forward_batch"]
    assert names(LayerCommunicator.prepare_mlp)[:4] == batch
    assert names(LayerCommunicator.postprocess_layer)[:4] == batch
    assert names(LayerCommunicator.should_use_reduce_scatter) == ["self", "forward_batch"]
    assert names(LayerCommunicator.should_fuse_mlp_allreduce_with_next_layer) == ["self", "forward_batch"]
    assert issubclass(host.Stage, LayerCommunicator)


def test_what_is_read_of_a_communicator():
    modes = {"layer_input_mode", "attn_mode", "middle_residual_mode", "layer_output_mode"}
    assert modes <= set(LayerScatterModes.__dataclass_fields__)
    assert ScatterMode.TP_ATTN_FULL in ScatterMode
    made = inspect.getsource(LayerCommunicator.__init__)
    assert all(f"self.{name}" in made for name in ("allow_reduce_scatter", "post_attention_layernorm"))
    assert ("self._sp_variant" in made) == (Version("0.5.19") <= RELEASE)


def test_experts_are_told_what_a_communicator_says():
    assert {"fuse_mlp_allreduce", "mlp_reduce_scatter"} <= set(get_forward()._DEFAULTS)
    layer = inspect.getsource(Qwen3MoeDecoderLayer.forward)
    order = ["prepare_mlp(", "should_use_reduce_scatter(", "mlp_reduce_scatter=", "self.mlp(", "postprocess_layer("]
    assert [layer.index(text) for text in order] == sorted(layer.index(text) for text in order)

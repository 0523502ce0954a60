"""What of SGLang's stages, which it has from 0.5.21 on, the expert-parallel adapter stands on."""

import inspect
import warnings

import pytest
from packaging.version import Version

pytest.importorskip("sglang")

from forerun_adapters._require import HOSTS
from forerun_adapters.sglang import RELEASE

if Version("0.5.21") > RELEASE:
    pytest.skip("a release with communicators", allow_module_level=True)

with warnings.catch_warnings():  # quantizations that this machine lacks
    warnings.simplefilter("ignore")
    from sglang.srt.layers.layer_boundary.residual.stream import Contribution, DeclaredSum, ResidualStream
    from sglang.srt.layers.layer_boundary.stage import StageBoundary
    from sglang.srt.runtime_context import get_forward

    from forerun_adapters import sglang_stage as host


def names(function):
    return list(inspect.signature(function).parameters)


def test_a_stage_prepares_and_finishes():
    assert names(StageBoundary.prepare)[:3] == ["self", "hidden_states", "forward_batch"]
    assert names(StageBoundary.finish)[:3] == ["self", "hidden_states", "forward_batch"]
    assert names(StageBoundary.exit)[:2] == ["self", "forward_batch"]
    assert "__slots__" not in vars(StageBoundary)  # its class can be changed
    assert issubclass(host.Stage, StageBoundary)


def test_a_stream_hands_a_part_of_a_sum_over():
    assert names(ResidualStream.input) == ["self", "hidden"]
    assert names(ResidualStream.write) == ["self", "residual"]
    assert names(getattr(ResidualStream, host._RECORD))[:3] == ["self", "output", "update"]
    assert {"value", "update", "owed"} <= set(Contribution.__struct_fields__)
    assert ("complete_sum" in DeclaredSum.__struct_fields__) == (Version("0.5.23") <= RELEASE)
    assert names(host._NORM.update_and_read)[:4] == ["update", "hidden_states", "residual", "norm"]
    assert getattr(host._NORM, host._NORMS) and getattr(host._ADD, host._ADDS)


def test_experts_are_told_where_they_add_up_themselves():
    assert ("fuse_mlp_allreduce" in get_forward()._DEFAULTS) == host._TOLD


def test_the_oldest_release_still_needs_its_shims():
    """Once 0.5.22 is the oldest release that is supported, what depends on `_TOLD` can go."""
    assert HOSTS["sglang"].supports(Version("0.5.21"))

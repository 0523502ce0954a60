"""`speculate` on real AutoEP models of every family, in real processes over gloo."""

import pytest

pytest.importorskip("deepspeed")

import torch
from processes import ran
from tiny_models import FAMILIES, tiny

from forerun.moe.deepspeed import speculate, unspeculate


def assert_all_agree(families, dtypes, way, ranks, tmp_path):
    """Exact is bitwise stock's, undone is as before, and every way sends fewer rows than stock does."""
    arguments = [",".join(families), ",".join(dtypes), way, "{rank}", str(ranks), str(tmp_path / "store")]
    codes, outputs = ran("deepspeed_program.py", ranks, arguments, seconds=290)
    assert codes == [0] * ranks, "\n".join(output[-3000:] for output in outputs)
    told = [line.split()[1:] for output in outputs for line in output.splitlines() if line.startswith("rows")]
    assert len(told) == ranks * len(families)
    for family in families:
        alone, planned, stock = (sum(int(row[column]) for row in told if row[0] == family) for column in (1, 2, 3))
        assert 0 < alone < stock
        assert 0 < planned < stock


@pytest.mark.parametrize("families", [("Mixtral", "Qwen2Moe", "Qwen3Moe"), ("DeepseekV2", "DeepseekV3")])
def test_two_ranks_speak_as_stock(families, tmp_path):
    assert_all_agree(families, ["float32", "bfloat16", "float16"][: len(families)], "bare", 2, tmp_path)


def test_an_engine_speaks_and_saves_as_stock(tmp_path):
    assert_all_agree(["Olmoe"], ["float32"], "engine", 2, tmp_path)


def test_four_ranks_speak_as_stock(tmp_path):
    assert_all_agree(["Qwen3Moe"], ["bfloat16"], "bare", 4, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_family_and_dtype_speaks_as_stock(family, dtype, ranks, tmp_path):
    assert_all_agree([family], [dtype], "bare", ranks, tmp_path)


def test_a_model_without_expert_parallel_layers_is_refused():
    with pytest.raises(ValueError, match="MixtralForCausalLM has no expert-parallel layer"):
        speculate(tiny("Mixtral"))
    model = tiny("Mixtral")
    unspeculate(model)
    assert isinstance(model, torch.nn.Module)

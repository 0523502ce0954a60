"""`speculate` on real AutoEP models of every family, in real processes over gloo."""

import pytest

pytest.importorskip("deepspeed")

import torch
from processes import ran
from tiny_models import FAMILIES, tiny

from forerun.moe.deepspeed import speculate, unspeculate


def assert_all_agree(family, dtype, way, ranks, tmp_path):
    """Exact is bitwise stock's, undone is as before, and every way sends fewer rows than stock does."""
    arguments = [family, dtype, way, "{rank}", str(ranks), str(tmp_path / "store")]
    codes, outputs = ran("deepspeed_program.py", ranks, arguments)
    assert codes == [0] * ranks, "\n".join(output[-3000:] for output in outputs)
    told = [line.split()[1:] for output in outputs for line in output.splitlines() if line.startswith("rows")]
    assert len(told) == ranks
    alone, planned, stock = (sum(int(row[column]) for row in told) for column in range(3))
    assert 0 < alone < stock
    assert 0 < planned < stock


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_speak_as_stock(family, tmp_path):
    assert_all_agree(family, "float32", "bare", 2, tmp_path)


@pytest.mark.parametrize(
    ("family", "dtype", "way", "ranks"), [("Qwen3Moe", "bfloat16", "bare", 4), ("Olmoe", "float32", "engine", 2)]
)
def test_four_ranks_and_an_engine(family, dtype, way, ranks, tmp_path):
    assert_all_agree(family, dtype, way, ranks, tmp_path)


def test_a_model_without_autoep_is_refused():
    with pytest.raises(ValueError, match="MixtralForCausalLM has no AutoEP layer"):
        speculate(tiny("Mixtral"))
    model = tiny("Mixtral")
    unspeculate(model)
    assert isinstance(model, torch.nn.Module)

"""Tokens shuffled around tensor-parallel attention on DeepSpeed's own folded AutoTP and AutoEP, in real processes."""

from importlib import metadata

import pytest

pytest.importorskip("deepspeed")

from processes import ran
from sglang_models import make_model


@pytest.mark.parametrize(("family", "tensor_parallel", "ranks"), [("Qwen3Moe", 2, 2), ("Mixtral", 2, 4)])
def test_shuffled_speaks_as_stock_and_sends_less(family, tensor_parallel, ranks, tmp_path):
    """Greedy tokens the same, logits but for roundings; undone, every module is stock's again, bit for bit."""
    arguments = [family, str(tensor_parallel), "{rank}", str(ranks), str(tmp_path / "store")]
    codes, outputs = ran("folded_program.py", ranks, arguments)
    assert codes == [0] * ranks, "\n".join(output[-3000:] for output in outputs)
    sent = {}
    for line in "\n".join(outputs).splitlines():
        match line.split():
            case ["stock" | "alone" | "in-order" | "shuffled" | "sums" as way, number]:
                sent[way] = sent.get(way, 0) + int(number)
    assert len(sent) == 5
    assert all(sent[way] < 0.75 * sent["stock"] for way in sent if way != "stock")
    assert sent["shuffled"] < sent["in-order"]
    assert sent["sums"] <= sent["shuffled"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_are_those_that_sglang_sends(ranks, tmp_path):
    """By the formula that SGLang's tests hold it to, for the same model, plan and prompt."""
    model = make_model(tmp_path / "model", "Qwen3Moe")
    arguments = [model, "{rank}", str(ranks), str(tmp_path / "store")]
    if ranks == 4 and metadata.version("deepspeed") == "0.19.4":  # which cannot split two key heads over four ranks
        codes, outputs = ran("figures_program.py", ranks, [*arguments, "stock"])
        assert all(code != 0 for code in codes)
        assert all("is invalid for input of size" in output for output in outputs)
        return
    codes, outputs = ran("figures_program.py", ranks, arguments)
    assert codes == [0] * ranks, "\n".join(output[-3000:] for output in outputs)
    rows = [
        int(word)
        for output in outputs
        for line in output.splitlines()
        if line.startswith("rows")
        for word in line.split()[1:]
    ]
    assert len(rows) == 3 * ranks
    assert 0 < sum(rows) < 61 * 3 * (ranks - 1)

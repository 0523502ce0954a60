"""`speculate` on classic `deepspeed.moe` models, in real processes over gloo."""

import pytest

pytest.importorskip("deepspeed")

from processes import ran

CASES = "top-1,top-2,top-3,dropping,dropping top-1,dropping top-3,residual,bfloat16,float16,init_inference"


def assert_all_agree(cases, group, ranks, tmp_path):
    arguments = [cases, str(group), "{rank}", str(ranks), str(tmp_path / "store")]
    codes, outputs = ran("classic_program.py", ranks, arguments)
    assert codes == [0] * ranks, "\n".join(output[-3000:] for output in outputs)
    for output in outputs:
        told = [line.split() for line in output.splitlines() if line.endswith(" rows")]
        assert len(told) == len(cases.split(","))
        assert all(int(sent) > 0 for _, sent, _ in told)


def test_two_ranks_answer_as_stock(tmp_path):
    """Bit for bit, whatever the gate; unequal batches as one rank with all experts; undone bit for bit."""
    assert_all_agree(CASES, 2, 2, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("group", [2, 4])
def test_four_ranks_answer_as_stock(group, tmp_path):
    cases = "top-2,top-3,dropping top-1,bfloat16"
    assert_all_agree(cases, group, 4, tmp_path)

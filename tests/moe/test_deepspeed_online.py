"""A speculated model that goes on serving while plans change, in real processes over gloo."""

import re
import signal

import pytest

pytest.importorskip("deepspeed")

from processes import ran


def online(what, ranks, tmp_path):
    return ran("online_program.py", ranks, [what, "{rank}", str(ranks), str(tmp_path / "store")])


def test_plans_change_while_it_serves(tmp_path):
    """Moves at once and by layers, within their bound; counts; a trial that stays and one that does not; refusals."""
    codes, outputs = online("all", 2, tmp_path)
    assert codes == [0, 0], "\n".join(output[-3000:] for output in outputs)
    assert all(output.splitlines()[-1] == "done" for output in outputs)


def test_a_rank_that_dies_while_experts_move_leaves_a_clear_error(tmp_path):
    codes, outputs = online("die", 2, tmp_path)
    assert codes == [0, -signal.SIGKILL], "\n".join(output[-3000:] for output in outputs)
    assert outputs[0].splitlines()[-2:] == ["lost", "told"]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_a_rank_killed_while_generating_ends_the_others(ranks, tmp_path):
    codes, outputs = ran("killed_program.py", ranks, ["{rank}", str(ranks), str(tmp_path / "store")])
    assert codes.pop() == -signal.SIGKILL
    for code, output in zip(codes, outputs, strict=False):
        assert code not in (0, None)
        words = next(line for line in output.splitlines() if line.startswith("tokens")).split()
        assert 5 <= int(words[1]) < 32
        assert int(words[3]) < 120
        assert re.search(r"RuntimeError: \S+: a rank of its group is lost or silent", output)

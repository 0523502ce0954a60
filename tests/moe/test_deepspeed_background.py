"""Experts that move to other ranks while forward passes go on, in real processes over gloo."""

import signal

import pytest

pytest.importorskip("deepspeed")

from processes import ran


def test_experts_move_while_passes_go_on(tmp_path):
    """Exact at every pass; interrupted, saved and loaded in the middle; a rank that fails, and one that dies."""
    codes, outputs = ran("background_program.py", 2, ["all", "{rank}", "2", str(tmp_path / "store")])
    assert codes == [0, -signal.SIGKILL], "\n".join(output[-3000:] for output in outputs)
    assert outputs[0].splitlines()[-2:] == ["lost True", "told"]


@pytest.mark.soak
def test_groups_of_ranks_move_each_for_itself(tmp_path):
    """Two groups of two ranks, then one of four; the process groups are destroyed in the middle of a move."""
    codes, outputs = ran("background_program.py", 4, ["groups", "{rank}", "4", str(tmp_path / "store")])
    assert codes == [0] * 4, "\n".join(output[-3000:] for output in outputs)
    assert all(output.splitlines()[-1] == "done" for output in outputs)

"""The exchange between real processes over gloo: every token's result as on one rank alone, every row counted."""

import signal

import pytest
from processes import ran


def exchanged(ranks, tmp_path, *more):
    return ran("exchange_program.py", ranks, ["{rank}", str(ranks), str(tmp_path / "store"), *more], seconds=200)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_gets_what_it_would_compute_alone(ranks, tmp_path):
    codes, outputs = exchanged(ranks, tmp_path)
    assert codes == [0] * ranks, "\n".join(outputs)
    assert all(len([line for line in output.splitlines() if "torch." in line]) == 10 for output in outputs)


def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path):
    codes, outputs = exchanged(2, tmp_path, "die")
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)
    assert "RuntimeError" in outputs[0] or "DistBackendError" in outputs[0]

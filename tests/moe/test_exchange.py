"""The exchange between real processes over gloo: every token's result as on one rank alone, every row counted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("exchange_program.py")
ROOT = Path(__file__).parents[2]


def ran(ranks, store, *more):
    path = os.pathsep.join([str(ROOT / "plugins"), str(ROOT / "adapters")])
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(ranks), str(store), *more],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_gets_what_it_would_compute_alone(ranks, tmp_path):
    codes, outputs = ran(ranks, tmp_path / "store")
    assert codes == [0] * ranks, "\n".join(outputs)
    assert all(len([line for line in output.splitlines() if "torch." in line]) == 10 for output in outputs)


def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path):
    codes, outputs = ran(2, tmp_path / "store", "die")
    assert codes[1] == 9
    assert codes[0] not in (0, None)
    assert "RuntimeError" in outputs[0] or "DistBackendError" in outputs[0]

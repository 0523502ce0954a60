"""Two processes, a real gloo group: the same picture as one process, and no hang when one of them dies."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks_program import pipeline, sample

from forerun.picard.diffusers import PicardScheduler
from forerun.picard.ranks import PointRanks

_PROGRAM = Path(__file__).with_name("ranks_program.py")
_SIZE = 2
_PATIENCE = 240  # seconds, most of them imports on a busy machine; one exchange waits for 10


def start(folder: Path, *deed: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, str(_PROGRAM), str(rank), str(_SIZE), str(folder / "store"), str(folder / "out"), *deed],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(_SIZE)
    ]


def finish(processes: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """What each process printed as errors; none outlives the call."""
    deadline = time.monotonic() + seconds
    try:
        return [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[1] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


def test_two_ranks_give_the_one_rank_picture(tmp_path: Path) -> None:
    processes = start(tmp_path)
    errors = finish(processes, _PATIENCE)
    assert [process.returncode for process in processes] == [0, 0], errors
    pipe = pipeline()
    rows: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    pipe.scheduler = PicardScheduler.from_pipe(pipe, tolerance=1e-5, check_cost=False)
    alone = sample(pipe, seed=3)
    for rank in range(_SIZE):
        result = torch.load(tmp_path / f"out.{rank}")
        assert torch.allclose(result["images"], alone, atol=1e-5)
        assert result["rounds"] == pipe.scheduler.report.rounds
        # The first call is everybody's; after it each rank has half of the points, one more where they do not divide.
        each = [-(-row // 2 // _SIZE) * 2 for row in rows[1:]]
        assert result["rows"] == [rows[0], *each]


def test_a_rank_that_dies_ends_the_other_with_a_clear_error(tmp_path: Path) -> None:
    processes = start(tmp_path, "die", "1", "4")
    errors = finish(processes, _PATIENCE)
    assert processes[1].returncode == 9
    assert processes[0].returncode == 1, errors[0]
    assert "rank 0 of 2 lost another rank while exchanging" in errors[0]


def test_ranks_that_start_from_different_noise_are_told(tmp_path: Path) -> None:
    processes = start(tmp_path, "other-noise")
    errors = finish(processes, _PATIENCE)
    assert [process.returncode for process in processes] == [1, 1], errors
    assert all("the ranks of the group start from different noise" in error for error in errors)


def test_a_group_has_to_exist() -> None:
    with pytest.raises(RuntimeError, match=r"init_process_group"):
        PointRanks()

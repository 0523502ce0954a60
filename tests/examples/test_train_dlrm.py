"""`examples/train_dlrm.py`: both plans train to the same losses on real ranks, and what they send is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torchrec")

import criteo
import dlrm_result
from sklearn.metrics import roc_auc_score

_EXAMPLES = Path(criteo.__file__).parent
_SMALL = ["--ranks", "2", "--steps", "6", "--warm-up", "1", "--batch", "16", "--dim", "8", "--scale", "0.001"]


def start(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(_EXAMPLES), *sys.path])
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )


def checked(result: dict[str, Any], ranks: int) -> None:
    """The two plans' figures are there, and their losses the same but for rounding."""
    stock, ours = result["plans"]
    assert (stock["planner"], ours["planner"]) == ("torchrec", "forerun")
    assert ours["rating_ms"] <= stock["rating_ms"] * (1 + 1e-9)
    assert result["largest_difference_of_losses"] < 1e-5
    assert 0 < result["speed_up"][0] <= result["speed_up"][1] <= result["speed_up"][2]
    for plan in result["plans"]:
        assert len(plan["losses"]) == 7
        assert len(plan["sharding"]) == 26
        assert len(plan["ranks"]) == ranks
        assert all(it["step_seconds"] > 0 and it["busy_seconds"] > 0 for it in plan["ranks"])
        assert all(it["sent_bytes"] > 0 and 0 < it["share_in_collectives"] <= 1 for it in plan["ranks"])
        assert plan["held_out_loss"] == pytest.approx(stock["held_out_loss"], abs=1e-5)
        assert 0 <= plan["held_out_auc"] <= 1


def test_a_log_in_criteos_format_is_trained_on(tmp_path: Path) -> None:
    log = tmp_path / "log.txt.gz"
    criteo.write_synthetic(log, 330)  # ten batches of both ranks, one of them held out
    done = start(str(_EXAMPLES / "train_dlrm.py"), "--data", f"criteo:{log}", *_SMALL, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "training-2.json").read_text())
    checked(result, 2)
    assert result["held_out"] == 32
    assert (tmp_path / "training-2.png").read_bytes().startswith(b"\x89PNG")
    assert "forerun" in done.stdout


def test_a_malformed_line_ends_all_ranks(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    criteo.write_synthetic(log, 330)
    content = log.read_bytes().splitlines(keepends=True)
    content[20] = b"not a click\n"  # of rank 1's share
    log.write_bytes(b"".join(content))
    done = start(str(_EXAMPLES / "train_dlrm.py"), "--data", f"criteo:{log}", *_SMALL)
    assert done.returncode == 1
    assert "log.txt:21: 1 fields" in done.stderr


def test_torchrun_starts_it_too(tmp_path: Path) -> None:
    script = str(_EXAMPLES / "train_dlrm.py")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    done = start(*launch, script, "--data", "synthetic:uniform", *_SMALL, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    checked(json.loads((tmp_path / "training-2.json").read_text()), 2)


def test_what_ranks_send_is_counted(tmp_path: Path) -> None:
    done = start(str(Path(__file__).with_name("traffic_ranks.py")), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first["all to all"], second["all to all"]) == (4 * 3 * 4, 5 * 3 * 4)
    for told in (first, second):
        assert told["even all to all"] == 4 * 4
        assert told["all-reduce"] == 100 * 8
        assert told["all-gather"] == 10 * 4
        assert told["nothing"] == [0, 0.0]
        assert told["refused"].startswith("gloo:broadcast is not counted")
    assert first["seconds"] > 0.1  # it waited for the other rank, which slept for a second


def test_the_quality_is_what_scikit_learn_says() -> None:
    random = np.random.default_rng(0)
    labels = (random.random(500) < 0.3).astype(np.float32)
    scores = np.round(random.normal(size=500) + labels, 1).astype(np.float32)  # with ties
    assert dlrm_result.auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))
    chance = 1 / (1 + np.exp(-scores.astype(np.float64)))
    expected = -np.log(np.where(labels > 0, chance, 1 - chance)).mean()
    assert dlrm_result.log_loss(labels, scores) == pytest.approx(expected)
    assert dlrm_result.auc(np.ones(5, np.float32), scores[:5]) is None

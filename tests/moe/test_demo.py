"""The demo's sections, of what the examples write; and the examples themselves, on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forerun.moe import demo, sglang_demo
from forerun.moe.plan import Plan

_ROOT = Path(__file__).parents[2]


def test_the_section_shows_what_the_example_wrote(tmp_path: Path) -> None:
    row = {
        "way": "stock AutoEP",
        "kilobytes": 812.4,
        "other_kilobytes": 3.0,
        "milliseconds": 11.25,
        "same": 32,
        "requests": 32,
        "ranks": 2,
    }

    (tmp_path / "serving.json").write_text(json.dumps([row]))
    (tmp_path / "plan.png").write_bytes(b"picture")
    section = demo.section(tmp_path)
    assert section.tables[0].rows == [("stock AutoEP", "812", "3", "11.2", "32 of 32")]
    assert section.pictures[0].png == b"picture"


def run(script: str, out: Path, seconds: float) -> None:
    """Runs an example small."""
    folders = (_ROOT / "plugins", _ROOT / "adapters", _ROOT / "examples")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, _ROOT / "examples" / script, "--tokens", "4000", "--out", out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_example_says_the_same_in_every_way_and_sends_less(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run("serve_tiny_moe.py", tmp_path, 280)
    rows = json.loads((tmp_path / "serving.json").read_text())
    assert all(row["same"] == row["requests"] == 32 for row in rows)
    stock, once, grouped, assigned, sums = (row["kilobytes"] for row in rows)
    assert sums < assigned < grouped < once < stock
    assert Plan.load(tmp_path / "plan.safetensors").ranks == 2
    assert not list(tmp_path.glob("*.log"))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_sglangs_example_says_the_same_in_every_way_and_sends_less(tmp_path: Path) -> None:
    if not (_ROOT / ".venv-sglang").exists():
        pytest.skip("there is no .venv-sglang: make setup")
    run(sglang_demo.SCRIPT, tmp_path, 1700)
    rows = json.loads((tmp_path / "sglang.json").read_text())
    assert all(row["same"] == row["requests"] == 32 for row in rows)
    stock, once, planned, _ = (row["kilobytes"] for row in rows)
    assert planned < once < stock
    section = sglang_demo.section(tmp_path)
    assert [told[0] for told in section.tables[0].rows] == [row["way"] for row in rows]
    assert all(told[-1] == "32 of 32" for told in section.tables[0].rows)
    assert Plan.load(tmp_path / "plan.safetensors").ranks == 2
    assert not list(tmp_path.glob("*.log"))

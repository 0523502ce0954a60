"""The demo's section, of what the example writes; and the example itself, on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forerun.moe import demo
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


def test_the_example_says_the_same_in_every_way_and_sends_less(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    folders = (_ROOT / "plugins", _ROOT / "adapters", _ROOT / "examples")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, _ROOT / "examples" / "serve_tiny_moe.py", "--tokens", "4000", "--out", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "serving.json").read_text())
    assert all(row["same"] == row["requests"] == 32 for row in rows)
    stock, once, grouped, assigned, sums = (row["kilobytes"] for row in rows)
    assert sums < assigned < grouped < once < stock
    assert Plan.load(tmp_path / "plan.safetensors").ranks == 2
    assert not list(tmp_path.glob("*.log"))

"""The demo's section of SGLang, of what the example writes: the example itself, run small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forerun.runahead import sglang_demo

_ROOT = Path(__file__).parents[2]
_SMALL = ("--tokens", "1024", "--layers", "2")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_sglangs_example_says_the_same_in_every_way(tmp_path: Path) -> None:
    if not (_ROOT / ".venv-sglang").exists():
        pytest.skip("there is no .venv-sglang: make setup")
    folders = (_ROOT / "plugins", _ROOT / "adapters", _ROOT / "examples")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, _ROOT / "examples" / sglang_demo.SCRIPT, *_SMALL, "--out", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "sglang.json").read_text())
    assert (found["tokens"], found["answer"]) == (1024, 96)
    section = sglang_demo.section(tmp_path)
    ways = ["one rank", "tensor-parallel over two", "KV-Runahead over two"]
    assert [told[0] for told in section.tables[0].rows] == ways
    assert all(told[-1] == "96 of 96 the same" for told in section.tables[0].rows)

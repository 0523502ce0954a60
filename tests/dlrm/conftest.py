"""Fixtures of the room's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What `forerun dlrm calibrate` wrote of two processes here, and what it printed."""
    out = tmp_path_factory.mktemp("calibrated") / "calibration.json"
    sizes = ("--largest", "1", "--repeats", "3", "--table", "4")  # MB
    done = subprocess.run(
        [sys.executable, "-m", "forerun", "dlrm", "calibrate", "--ranks", "2", "--out", str(out), *sizes],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=240,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout

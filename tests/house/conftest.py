"""Fixtures of the house's tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root():
    """The repository's root."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def run_python(root):
    """Runs code in a fresh interpreter that finds this checkout's packages; returns what it prints."""

    def run(code, python=sys.executable, **variables):
        path = os.pathsep.join([str(root / "plugins"), str(root / "adapters"), variables.pop("PYTHONPATH", "")])
        done = subprocess.run(
            [python, "-c", code],
            env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), **variables},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run

"""Runs a script of the repository's `examples` folder for a demonstration, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["run_example"]


def run_example(name: str, out: Path, progress: Callable[[str], None]) -> None:
    """Runs `examples/NAME --out OUT`.

    Args:
        name: The script's file name.
        out: Folder that the script writes to.
        progress: Is told each line that the script prints.

    Raises:
        FileNotFoundError: The current folder is not a checkout of forerun.
        RuntimeError: The script failed; the message ends with what it printed.
    """
    script = Path("examples") / name
    if not script.is_file():
        raise FileNotFoundError(
            f"there is no {script} in {Path.cwd()}: the demo needs a checkout of forerun, and runs from its root"
        )
    told: list[str] = []
    command = [sys.executable, "-u", str(script), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told.append(line.rstrip())
            progress(told[-1])
    if process.returncode:
        last = "\n".join(told[-10:])
        raise RuntimeError(f"{script} failed (exit {process.returncode}):\n{last}")

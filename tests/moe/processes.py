"""Programs run as ranks: every one is waited for, and none is left behind."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def ran(program, ranks, arguments, seconds=280):
    """Runs `program ARGUMENTS`, "{rank}" filled in, once a rank; exit statuses and what each printed."""
    folders = (
        _ROOT / "plugins",
        _ROOT / "adapters",
        _ROOT / "examples",
        _ROOT / "tests" / "hosts",
        Path(__file__).parent,
    )
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]  # where another release lies over
    fresh = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(program)), *(a.format(rank=rank) for a in arguments)],
            env={**os.environ, **fresh, "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs

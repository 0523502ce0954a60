"""One process between whoever starts an engine and the engine: none of the engine's processes outlives either.

    python -m forerun.runahead.keeper CORES COMMAND …

It leads a session of its own, keeps to the cores ("0,1"; "": all), and starts the command. Once its standard input
ends, which it does with the process at the other end, however that died, or once the command has ended, everything in
its process group ends: the command is asked first and has `GRACE` seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

__all__ = ["GRACE", "main"]

GRACE = 10.0


def main(cores: str, command: list[str]) -> None:
    """Runs the command until it ends or standard input does; never returns."""
    os.setsid()
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, map(int, cores.split(",")))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: _end(child))
    threading.Thread(target=_watch, args=(child,), daemon=True).start()
    status = child.wait()
    print(f"forerun: the engine has ended with status {status}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)


def _watch(child: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):
        pass
    _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    timer = threading.Timer(GRACE, os.killpg, (0, signal.SIGKILL))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

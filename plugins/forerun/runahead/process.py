"""One vLLM server as a child process, from one start to the next, with all the processes that it starts itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from forerun.runahead.places import Place

__all__ = ["Process"]

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the environment's proxies are not for this
_LONGEST = 60.0  # seconds between two starts of an engine that dies again and again


class Process:
    """One engine's processes; a keeper leads them, which ends them when this process ends.

    Args:
        url: Where it will answer.
        command: Of its server.
        place: Where it runs.
        variables: Its whole environment.
        log: File that its output is added to.
    """

    def __init__(self, url: str, command: Sequence[str], place: Place, variables: Mapping[str, str], log: Path) -> None:
        self.url, self.log = url, log
        cores = ",".join(map(str, place.cores))
        self._command = [sys.executable, "-m", "forerun.runahead.keeper", cores, *command]
        self._variables = dict(variables)
        self._process: subprocess.Popen[bytes] | None = None
        self._since, self._delay = -float("inf"), 0.0

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self._variables
            )
        lasted, self._since = time.monotonic() - self._since, time.monotonic()
        self._delay = 1.0 if lasted > _LONGEST else min(_LONGEST, 2 * self._delay)

    def runs(self) -> bool:
        """Whether it has not ended; what it may have left behind is ended."""
        if self._process is None:
            return False
        if self._process.returncode is None and not self._is_over():
            return True
        self.end(0.0)
        return False

    def is_due(self) -> bool:
        """Whether it may be started again."""
        return time.monotonic() > self._since + self._delay

    def answers(self) -> bool:
        try:
            with _direct.open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def last_words(self, size: int = 4000) -> str:
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - size))
            return f"{self.log} ends:\n{log.read().decode(errors='replace')}"

    def ask_to_end(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def end(self, patience: float) -> None:
        """Ends all of its processes, which have so many seconds to do so themselves."""
        if self._process is None or self._process.returncode is not None:
            return
        self.ask_to_end()
        end = time.monotonic() + patience
        while not self._is_over() and time.monotonic() < end:
            time.sleep(0.05)
        for kill in (os.killpg, os.kill):  # its group, if it lived long enough to have one; itself
            try:
                kill(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        self._process.wait()

    def _is_over(self) -> bool:
        """Whether it has ended. It stays unreaped until its group is gone, so that its number is nobody else's."""
        assert self._process is not None
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

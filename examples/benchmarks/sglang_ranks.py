"""SGLang servers for the benchmarks: a core for each rank, or shared, and a network namespace if asked for."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from links import ADDRESS, INTERFACE

_ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT / "tests" / "hosts"))

from sglang_servers import ENVIRONMENT, ON_CPU, SHIMS  # noqa: E402

__all__ = ["Ranks", "versions"]

PYTHON = _ROOT / ".venv-sglang" / "bin" / "python"  # SGLang's pins need an environment of their own
_FLAGS = {
    **ON_CPU,
    "max-running-requests": "2",
    "chunked-prefill-size": "-1",
    "max-prefill-tokens": "32768",
    "watchdog-timeout": "1200",
    "log-level": "warning",
}
_SWITCHES = ("disable-overlap-schedule", "disable-cuda-graph", "skip-server-warmup", "skip-tokenizer-init")
_PORTS = iter(range(20_000, 32_000, 100))  # below those that the system gives out
_ASK = Path(__file__).with_name("sglang_ask.py")


class Ranks:
    """One server; its ranks are nodes to SGLang, so that each keeps to its core, and to its network if it has one.

    Args:
        model: Folder of the model.
        folder: For logs.
        name: Of the logs.
        tokens: Of the longest prompt.
        ranks: Their number; on fewer cores they share them.
        flags: Further ones of SGLang, which go before those that are given here.
        config: Of FORERUN_SGLANG; None: without forerun.
        spaces: Network namespaces of the ranks; none: this one.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        name: str,
        tokens: int,
        *,
        ranks: int,
        flags: Sequence[str] = (),
        config: dict[str, Any] | None = None,
        spaces: Sequence[str] = (),
    ) -> None:
        self.port, self._model = _free_port(), model
        self.inside = ["ip", "netns", "exec", spaces[0]] if spaces else []  # before a command beside the first rank
        self._logs = [folder / f"{name}-{rank}.log" for rank in range(ranks)]
        shown = {**_FLAGS, "context-length": tokens + 64, "max-total-tokens": 4 * tokens}
        shared = [word for flag, value in shown.items() for word in (f"--{flag}", str(value))]
        shared += [f"--{switch}" for switch in _SWITCHES] + list(flags)
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
        cores = [cores[rank % len(cores)] for rank in range(ranks)]
        shared += ["--tp-size", str(ranks), "--nnodes", str(ranks)]
        host = ADDRESS.format(1) if spaces else "127.0.0.1"
        shared += ["--dist-init-addr", f"{host}:{_free_port()}"]
        paths = [SHIMS, _ROOT / "plugins", _ROOT / "adapters"]
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank, log in enumerate(self._logs):
            command = ["ip", "netns", "exec", spaces[rank]] if spaces else []
            command += ["taskset", "-c", cores[rank], str(PYTHON), "-m", "sglang.launch_server"]
            command += ["--model-path", str(model), *shared, "--node-rank", str(rank)]
            command += ["--port", str(_free_port() if rank else self.port)]
            address = ADDRESS.format(rank + 1) if spaces else "127.0.0.1"
            variables = {
                **os.environ,
                **ENVIRONMENT,
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "SGLANG_CPU_OMP_THREADS_BIND": "|".join(cores),
                # It takes ranks that share memory for ones that share 127.0.0.1: in namespaces they would wait.
                "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "0",
                "GLOO_SOCKET_IFNAME": INTERFACE if spaces else "lo",
                "SGLANG_HOST_IP": address,
                "HOST_IP": address,
                "FORERUN_SGLANG": json.dumps(config) if config is not None else "",
                "FORERUN_CPU_STRATEGIES": "1",
            }
            with log.open("w") as file:
                self._processes.append(
                    subprocess.Popen(command, stdout=file, stderr=file, env=variables, start_new_session=True)
                )

    @property
    def ended(self) -> bool:
        """Whether a rank has."""
        return any(process.poll() is not None for process in self._processes)

    def ask(self, lengths: Sequence[int], repeats: int, seconds: float = 1800) -> list[dict[str, Any]]:
        """Rows of `sglang_ask.py`, asked from where the first rank is; waits for the server to start.

        Raises:
            RuntimeError: It did not answer.
        """
        command = [*self.inside, sys.executable, str(_ASK), str(self.port), str(self._model), str(repeats)]
        command += map(str, lengths)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
            end = time.monotonic() + seconds
            while asking.poll() is None:
                gone = self.ended
                if gone or time.monotonic() > end:
                    asking.kill()
                    raise RuntimeError("the server ended" if gone else f"no answer in {seconds} s")
                time.sleep(0.2)
            told = asking.stdout.read() if asking.stdout else ""
        if asking.returncode:
            raise RuntimeError(f"asking ended with {asking.returncode}")
        rows: list[dict[str, Any]] = json.loads(told)
        return rows

    def told(self) -> str:
        """The ends of the logs."""
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in self._logs)

    def pause(self) -> None:
        """All its processes stand still until they are resumed, so that another server has the cores."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait(60)

    def _signal(self, sent: signal.Signals) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sent)


def versions(*packages: str) -> dict[str, str]:
    """Of packages in SGLang's environment."""
    program = (
        "import json, sys; from importlib.metadata import version as v; print(json.dumps(list(map(v, sys.argv[1:]))))"
    )
    told = subprocess.run([PYTHON, "-c", program, *packages], capture_output=True, text=True, check=True, timeout=60)
    return dict(zip(packages, json.loads(told.stdout), strict=True))


def _free_port() -> int:
    """With room for those that SGLang counts on from it; no other server is given them, in whatever namespace it is."""
    for port in _PORTS:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError("no port is left for a server; expected some between 20000 and 32000")

"""vLLM servers for the benchmark: started each on its cores, paused while others are measured, ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from forerun.runahead.engine_client import EngineClient

__all__ = ["LOOPBACK", "Server"]

LOOPBACK = "127.0.0.1"


class Server:
    """One vLLM server.

    Args:
        model: Folder of the model.
        log: File for its output.
        cores: It and all its processes run on these.
        arguments: Further ones of vLLM.
        chained: With the connector.
        host: Address that it listens on.
        within: Network namespace that it runs in; None: this process's.
        threads: vLLM's binding of its workers' threads; None: the cores.
        transport: Of the connector.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        cores: Sequence[int],
        arguments: Sequence[str] = (),
        *,
        chained: bool = False,
        host: str = LOOPBACK,
        within: str | None = None,
        threads: str | None = None,
        transport: str = "auto",
    ) -> None:
        port, self.listen = _free_port(), _free_port()
        self.url, self.host, self._log = f"http://{host}:{port}", host, log
        command = ["ip", "netns", "exec", within] if within else []
        command += ["taskset", "-c", ",".join(map(str, cores)), sys.executable]
        command += ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "model"]
        command += ["--host", host, "--port", str(port), "--dtype", "float32", *arguments]
        if chained:
            extra = {"listen": f"{host}:{self.listen}", "timeout": 120, "transport": transport}
            transfer: dict[str, Any] = {
                "kv_connector": "RunaheadConnector",
                "kv_connector_module_path": "forerun.runahead.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": extra,
            }
            command += ["--kv-transfer-config", json.dumps(transfer)]
        settings = {
            "FORERUN_RUNAHEAD_SECRET": "benchmark",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": threads or ",".join(map(str, cores)),
            "VLLM_NO_USAGE_STATS": "1",
        }
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, **settings}, start_new_session=True
            )

    def ready(self, seconds: float = 900) -> EngineClient:
        """The server's API once it answers.

        Raises:
            RuntimeError: It ended, or does not answer in time.
        """
        end = time.monotonic() + seconds
        while True:
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.url} is not ready:\n{self._log.read_text()[-4000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return EngineClient.connect(self.url, (self.host, self.listen))
            except (OSError, urllib.error.URLError):
                time.sleep(0.5)

    def pause(self) -> None:
        """Takes its processes off the cores."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        self.resume()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with suppress(ProcessLookupError):  # none of its processes is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as taken:
        return int(taken.getsockname()[1])

"""vLLM servers as child processes, each an engine of a chain: restarted when they die, ended for certain.

    with Engines("Qwen/Qwen3-8B", 2, logs=Path("logs")) as engines:
        engines.endpoints  # where each is asked, and where its connector listens

Every engine is vLLM's own API server with `RunaheadConnector`, on ports, cores or GPUs of its own. The user's vLLM
arguments go to all of them.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from forerun.runahead.arguments import check_arguments, value_of
from forerun.runahead.keeper import GRACE
from forerun.runahead.places import GPUS, Place, find_places
from forerun.runahead.process import Process
from forerun.runahead.wire import SECRET

__all__ = ["Endpoint", "EngineError", "Engines"]

_MEMORY = ("--gpu-memory-utilization", "--memory-utilization", "--kv-cache-memory-bytes")
_PORTS = range(20000, 32768)  # below those that outgoing connections take: an engine keeps its own while it is down


class EngineError(RuntimeError):
    """An engine did not start; the message has the end of its log."""


@dataclass(frozen=True)
class Endpoint:
    """An engine of a chain.

    Args:
        url: Of its API server, without a path.
        address: "host:port" where its connector listens.
    """

    url: str
    address: str


class Engines:
    """So many engines of one model on this machine; a context manager that starts them and waits until they answer.

    Args:
        model: As vLLM names it.
        count: Of engines.
        logs: Folder of the engines' logs, `engine-0.log` and on.
        arguments: Further ones of vLLM, for every engine.
        cores, gpus: Of each engine, as `find_places` takes them.
        listen: Host that the connectors listen on, as the other engines reach it.
        options: More of `kv_connector_extra_config`.
        patience: Seconds until all engines have to answer.

    Raises:
        ValueError: An argument contradicts what the engines are told, or there are too few cores or GPUs.
    """

    def __init__(
        self,
        model: str,
        count: int,
        *,
        logs: Path,
        arguments: Sequence[str] = (),
        cores: str | None = None,
        gpus: str | None = None,
        listen: str = "127.0.0.1",
        options: Mapping[str, Any] | None = None,
        patience: float = 1800.0,
    ) -> None:
        check_arguments(arguments)
        if listen in ("0.0.0.0", "::"):
            raise ValueError(f"engines cannot send to {listen}: expected the address that they reach this machine by")
        ranks = int(value_of(arguments, "--tensor-parallel-size", "-tp") or 1)
        places = find_places(count, ranks=ranks, cores=cores, gpus=gpus)
        taken: set[int] = set()
        # The connector of tensor-parallel rank r listens r ports further.
        ports = [(_free_ports("127.0.0.1", 1, taken), _free_ports(listen, ranks, taken)) for _ in places]
        self.endpoints = tuple(Endpoint(f"http://127.0.0.1:{port}", f"{listen}:{further}") for port, further in ports)
        self.restarts = 0
        self._patience = patience
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *arguments]
        command.append("--disable-uvicorn-access-log")  # a line for each look at its health
        if _shares_memory(arguments, places):
            command += ["--gpu-memory-utilization", f"{0.8 / count:.3f}"]
        shared = {**os.environ, SECRET: os.environ.get(SECRET) or secrets.token_hex(32)}
        self._processes = [
            Process(
                endpoint.url,
                [*command, "--host", "127.0.0.1", "--port", str(port), *_transfer(endpoint.address, options or {})],
                place,
                {**shared, **place.variables},
                logs / f"engine-{i}.log",
            )
            for i, (endpoint, (port, _), place) in enumerate(zip(self.endpoints, ports, places, strict=True))
        ]

    @property
    def logs(self) -> tuple[Path, ...]:
        return tuple(process.log for process in self._processes)

    def __enter__(self) -> Engines:
        try:
            self.start()
            self.wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Starts all, and does not wait."""
        for process in self._processes:
            process.start()

    def wait(self) -> None:
        """Until every engine answers.

        Raises:
            EngineError: One has ended, or does not answer in time.
        """
        end = time.monotonic() + self._patience
        for process in self._processes:
            while not process.answers():
                if dead := next((other for other in self._processes if not other.runs()), None):
                    raise EngineError(f"an engine ended before it was ready. {dead.last_words()}")
                if time.monotonic() > end:
                    raise EngineError(f"an engine is not ready after {self._patience:.0f} s. {process.last_words()}")
                time.sleep(0.2)

    def check(self) -> tuple[Endpoint, ...]:
        """Starts those again that have ended, each ever later if it keeps ending; returns them. Does not wait."""
        again = []
        for endpoint, process in zip(self.endpoints, self._processes, strict=True):
            if not process.runs() and process.is_due():
                process.start()
                again.append(endpoint)
        self.restarts += len(again)
        return tuple(again)

    def close(self) -> None:
        """Ends every process of every engine, within `GRACE` and some seconds."""
        for process in self._processes:
            process.ask_to_end()
        end = time.monotonic() + GRACE + 2
        for process in self._processes:
            process.end(max(0.0, end - time.monotonic()))


def _transfer(address: str, options: Mapping[str, Any]) -> list[str]:
    config = {
        "kv_connector": "RunaheadConnector",
        "kv_connector_module_path": "forerun.runahead.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {**options, "listen": address},
    }
    return ["--kv-transfer-config", json.dumps(config)]


def _shares_memory(arguments: Sequence[str], places: Sequence[Place]) -> bool:
    """Whether engines share the machine's memory, of which each would take nearly all, and nobody said how much."""
    said = os.environ.get("VLLM_CPU_KVCACHE_SPACE") or value_of(arguments, *_MEMORY)
    return not said and not any(GPUS in place.variables for place in places)


def _free_ports(host: str, count: int, taken: set[int]) -> int:
    """The first of so many ports in a row that nobody has."""
    for _ in range(1000):
        first = random.choice(_PORTS[:-count])
        ports = range(first, first + count)
        if not taken & set(ports) and all(_is_free(host, port) for port in ports):
            taken.update(ports)
            return first
    raise EngineError(f"no free ports between {_PORTS[0]} and {_PORTS[-1]} on {host}")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind((host, port))
        except OSError:
            return False
    return True

"""SGLang's server for the benchmark, its ranks in network namespaces or on one host, and a client beside the first.

    python moe_sglang_server.py PORT    # the client: a request a line from standard input, an answer a line

Standard library only: the client runs by SGLang's Python, the benchmark by its own.
"""

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

_ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT / "tests" / "hosts"))

from sglang_servers import ENVIRONMENT, ON_CPU, SHIMS  # noqa: E402

__all__ = ["Client", "Server"]

_ADDRESS, _INTERFACE = "10.213.47.1", "fr0"  # of the first rank, in its namespace: see links.py
_FLAGS = """
    --max-total-tokens 8192 --max-running-requests 16
    --chunked-prefill-size 2048 --disable-overlap-schedule --disable-cuda-graph
    --disable-radix-cache --skip-server-warmup --skip-tokenizer-init --log-level warning
"""
_APART = ("--boundary-reduction", "rs")  # what is chosen otherwise is for NCCL alone


class Server:
    """A server.

    Args:
        model: Folder of the model.
        ranks: Over which its experts are spread.
        apart: Whether its attention is data-parallel over them, not tensor-parallel.
        log: File for its output; a further rank's has a number after it.
        python: That has SGLang.
        config: Of the section `speculative_moe`; None: stock.
        names: Namespaces of its ranks; none: all on this host.
        seconds: After which its start is given up.
    """

    def __init__(
        self,
        model: Path,
        ranks: int,
        apart: bool,
        log: Path,
        python: Path,
        config: dict[str, Any] | None,
        names: Sequence[str],
        seconds: float,
    ) -> None:
        self.port, self.names, self.seconds = _free_port(), list(names), seconds
        self.log = log
        cores = sorted(os.sched_getaffinity(0))
        folders = (SHIMS, _ROOT / "plugins", _ROOT / "adapters")
        settings = {
            **ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks)),
            "GLOO_SOCKET_IFNAME": _INTERFACE if names else "lo",
        }
        if names:  # it takes ranks that share memory for ones that share 127.0.0.1, and would wait
            settings["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] = "0"
        if config is not None:
            settings["FORERUN_SGLANG"] = json.dumps({"speculative_moe": config})
        command = [str(python), "-m", "sglang.launch_server", "--model-path", str(model), *_FLAGS.split()]
        command += [word for flag, value in ON_CPU.items() for word in (f"--{flag}", value)]
        further = ["--dp", str(ranks), "--enable-dp-attention", *_APART] if apart else []
        command += ["--tp", str(ranks), "--ep", str(ranks), *further, "--host", "127.0.0.1", "--port", str(self.port)]
        nodes = "--nnodes {} --dist-init-addr {}:{} --node-rank {}"
        port = _free_port()
        self.processes = []
        for rank in range(max(1, len(names))):
            inside = ["ip", "netns", "exec", names[rank]] if names else []
            node = nodes.format(ranks, _ADDRESS, port, rank).split() if names else []
            with log.with_name(f"{log.name}{rank or ''}").open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*inside, *command, *node],
                        stdout=file,
                        stderr=file,
                        env={**os.environ, **settings},
                        start_new_session=True,
                    )
                )

    def close(self) -> None:
        """Ends all of its processes."""
        for sent, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
            for process in self.processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, sent)
            for process in self.processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)


class Client:
    """A process beside the server's first rank that asks it, once it answers.

    Args:
        server: Which.
        python: Any.
    """

    def __init__(self, server: Server, python: Path) -> None:
        inside = ["ip", "netns", "exec", server.names[0]] if server.names else []
        command = [*inside, str(python), __file__, str(server.port)]
        self._server = server
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Client:
        end = time.monotonic() + self._server.seconds
        while not self._ask("ready", {}):
            ended = [process.poll() for process in self._server.processes]
            if any(code is not None for code in ended) or time.monotonic() > end:
                raise RuntimeError(f"the server is not ready ({ended}):\n{self._server.log.read_text()[-4000:]}")
            time.sleep(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(30)

    def batch(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds until so many tokens have come to all of these prompts, and the tokens."""
        told = self._ask("batch", {"prompts": prompts, "tokens": tokens})
        return float(told["seconds"]), told["answers"]

    def further(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds from the first tokens of these prompts to the last of so many further ones; all tokens."""
        whole, answers = self.batch(prompts, 1 + tokens)
        return whole - self.batch(prompts, 1)[0], answers

    def state(self) -> dict[str, Any]:
        """What forerun says of itself on the first rank; nothing in stock."""
        return dict(self._ask("state", {}))

    def layers(self) -> list[dict[str, Any]]:
        """What the first rank's layers counted; none in stock."""
        return list(self.state().get("layers", []))

    def _ask(self, what: str, given: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"what": what, **given}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client ended; the server said:\n{self._server.log.read_text()[-4000:]}")
        return json.loads(line)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _call(port: int, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        text = answer.read().decode()
    return json.loads(text) if text.strip() else {}


def _answer(port: int, what: str, given: dict[str, Any]) -> Any:
    if what == "ready":
        try:
            _call(port, "/health")
        except (OSError, urllib.error.URLError):
            return False
        return True
    if what == "state":
        states = _call(port, "/server_info")["internal_states"]
        return (states[0].get("forerun") or {}).get("speculative_moe", {})
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": given["tokens"]}
    start = time.perf_counter()
    answers = _call(port, "/generate", {"input_ids": given["prompts"], "sampling_params": sampling})
    return {"seconds": time.perf_counter() - start, "answers": [one["output_ids"] for one in answers]}


def _serve(port: int) -> None:
    for line in sys.stdin:
        given = json.loads(line)
        print(json.dumps(_answer(port, given.pop("what"), given)), flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))

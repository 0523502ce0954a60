"""A client beside the first rank of a server, for the MoE benchmark: a request a line from its input, an answer a line.

    python moe_sglang_client.py PORT

Standard library only: it runs in the first rank's network namespace, by any Python.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_ranks import Ranks

__all__ = ["Client"]


class Client:
    """A process beside the server's first rank that asks it, once it answers.

    Args:
        server: Which.
        seconds: After which its start is given up.
    """

    def __init__(self, server: Ranks, seconds: float) -> None:
        command = [*server.inside, sys.executable, __file__, str(server.port)]
        self._server, self._seconds = server, seconds
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Client:
        end = time.monotonic() + self._seconds
        while not self._ask("ready", {}):
            if self._server.ended or time.monotonic() > end:
                raise RuntimeError(f"the server is not ready:\n{self._server.told()}")
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
            raise RuntimeError(f"the client ended; the server said:\n{self._server.told()}")
        return json.loads(line)


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

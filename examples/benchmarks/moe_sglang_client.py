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
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sglang_ranks import Ranks

__all__ = ["Answered", "Client"]

_MEANWHILE = 4  # tokens of what is answered when others come


class Answered(NamedTuple):
    """What came to prompts that were asked together, token by token."""

    first: float  # s until each prompt's first token had come
    between: list[float]  # s between two tokens of a prompt, once each had its first one
    answers: list[list[int]]


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

    def batch(self, prompts: list[list[int]], tokens: int, meanwhile: list[int] | None = None) -> Answered:
        """So many tokens to each of these prompts, which are asked together.

        Args:
            prompts: Token ids of each.
            tokens: Of each answer.
            meanwhile: A prompt that is being answered when they come, just after a token of it. A server that is idle
                begins with the first of them that it sees, and has one batch or several of them by chance.
        """
        return Answered(**self._ask("batch", {"prompts": prompts, "tokens": tokens, "meanwhile": meanwhile}))

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


def _asked(port: int, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=600)


def _call(port: int, path: str) -> Any:
    with _asked(port, path) as answer:
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
    if given["meanwhile"] is None:
        return _streamed(port, given["prompts"], given["tokens"])
    other = _stream(port, [given["meanwhile"]], _MEANWHILE)
    for _ in range(2):  # the next token is under way
        next(other)
    answered = _streamed(port, given["prompts"], given["tokens"])
    for _ in other:
        pass
    return answered


def _stream(port: int, prompts: list[list[int]], tokens: int) -> Iterator[dict[str, Any]]:
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": tokens}
    with _asked(port, "/generate", {"input_ids": prompts, "sampling_params": sampling, "stream": True}) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            told = json.loads(line[len(b"data: ") :])
            if "output_ids" not in told:
                raise RuntimeError(f"the server answered {told}")
            yield told


def _streamed(port: int, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    came: list[list[float]] = [[] for _ in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    start = time.perf_counter()
    for told in _stream(port, prompts, tokens):
        now, at = time.perf_counter() - start, told.get("index", 0)
        every, ids = told["meta_info"]["completion_tokens"], told["output_ids"]
        answers[at] = ids if len(ids) == every else answers[at] + ids
        came[at] += [now] * (every - len(came[at]))
    if any(len(one) != tokens for one in (*came, *answers)):
        raise RuntimeError(
            f"{list(map(len, answers))} tokens came; expected {tokens} to each of {len(prompts)} prompts"
        )
    first = max(one[0] for one in came)
    between = [after - before for one in came for before, after in pairwise(one) if before >= first]
    return {"first": first, "between": between, "answers": answers}


def _serve(port: int) -> None:
    for line in sys.stdin:
        given = json.loads(line)
        print(json.dumps(_answer(port, given.pop("what"), given)), flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))

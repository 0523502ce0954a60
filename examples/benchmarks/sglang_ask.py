"""Asks an SGLang server on this host for first tokens and prints rows as JSON: PORT MODEL REPEATS LENGTH…

It runs in the network namespace of the server's first rank, for which it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import random
import sys
import time
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

_PATIENCE = 900.0
_MORE = 4  # tokens after the first


def main() -> None:
    port, model, repeats, *lengths = sys.argv[1:]
    url = f"http://127.0.0.1:{port}"
    _wait(url)
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    draw = random.Random(0)
    rows = []
    _ask(url, [draw.randrange(4, vocabulary) for _ in range(256)])  # what the first pass sets up
    for length in map(int, lengths):
        measured = [_ask(url, [draw.randrange(4, vocabulary) for _ in range(length)]) for _ in range(int(repeats))]
        firsts, nexts, tokens = zip(*measured, strict=True)
        rows.append({"tokens": length, "measured": firsts, "next": nexts, "answers": tokens, "told": _told(url)})
        print(f"{length} tokens: {sorted(firsts)[len(firsts) // 2]:.3f} s", file=sys.stderr, flush=True)
    print(json.dumps(rows))


def _ask(url: str, prompt: list[int]) -> tuple[float, list[float], list[int]]:
    """Seconds to the first token, and from each to the next; the tokens."""
    settings = {"temperature": 0, "max_new_tokens": 1 + _MORE, "ignore_eos": True}
    body = json.dumps({"input_ids": prompt, "stream": True, "sampling_params": settings}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    start, times, tokens = time.perf_counter(), list[float](), list[int]()
    with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter() - start)
                tokens = json.loads(line[6:])["output_ids"]
    return times[0], [b - a for a, b in pairwise(times)], tokens


def _told(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/server_info", timeout=60) as answer:
        return [state.get("forerun") for state in json.loads(answer.read())["internal_states"]]


def _wait(url: str) -> None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        except (OSError, urllib.error.URLError):
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    main()
